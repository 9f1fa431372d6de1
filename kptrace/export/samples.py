# SPDX-License-Identifier: Apache-2.0
"""What sources give, checked and joined by metric, and turned into prometheus_client's form. Pure."""

import math
from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise

from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.samples import Exemplar as PrometheusExemplar

from kptrace.model.metrics import Exemplar, HistogramSample, MetricFamily, MetricSpec, Sample

AnySample = Sample | HistogramSample
_Labels = tuple[str, ...]
_Bucket = tuple[str, float] | tuple[str, float, PrometheusExemplar]


class Gathered:
    """The families of one scrape: each metric once, each label set once, whichever sources they come from."""

    def __init__(self, reserved: Iterable[MetricSpec] = ()) -> None:
        """Nothing yet; `reserved` are metrics that no source may yield."""
        self._reserved = frozenset(spec.name for spec in reserved)
        self._metrics: dict[str, tuple[MetricSpec, dict[_Labels, AnySample]]] = {}

    def add(self, families: Iterable[MetricFamily]) -> None:
        """Take all of a source's families, or none of them.

        Raises:
            ValueError: they break their own specification, or repeat what is there: Prometheus would refuse the
                whole scrape.
        """
        fresh: dict[str, tuple[MetricSpec, dict[_Labels, AnySample]]] = {}
        for family in families:
            name = family.spec.name
            spec, known = self._metrics.get(name, (family.spec, {}))
            samples = fresh.setdefault(name, (family.spec, {}))[1]
            if name in self._reserved or spec != family.spec or fresh[name][0] != family.spec:
                raise ValueError(f"{name} is another source's, with another meaning")
            for sample in family.samples:
                _check(spec, sample)
                labels = tuple(map(_clean, sample.labels))
                if labels in known or labels in samples:
                    raise ValueError(f"{name}{labels} is there twice")
                samples[labels] = sample
        for name, (spec, samples) in fresh.items():
            self._metrics.setdefault(name, (spec, {}))[1].update(samples)

    def families(self) -> list[MetricFamily]:
        """All families so far, in the order in which their metrics appeared."""
        return [
            MetricFamily(spec, [_relabelled(sample, labels) for labels, sample in samples.items()])
            for spec, samples in self._metrics.values()
        ]


def to_prometheus(family: MetricFamily) -> Metric:
    """A checked family as prometheus_client's; without samples it is the description alone."""
    spec = family.spec
    if spec.kind == "histogram":
        histogram = HistogramMetricFamily(spec.name, spec.help, labels=spec.labels)
        for sample in family.samples:
            if isinstance(sample, HistogramSample):
                buckets = [_bucket(edge, count, sample.exemplars.get(edge)) for edge, count in sample.buckets]
                histogram.add_metric(sample.labels, buckets, sample.sum)
        return histogram
    kind = CounterMetricFamily if spec.kind == "counter" else GaugeMetricFamily
    metric = kind(spec.name, spec.help, labels=spec.labels)
    for sample in family.samples:
        if isinstance(sample, Sample):
            metric.add_metric(sample.labels, sample.value)
    return metric


def _check(spec: MetricSpec, sample: AnySample) -> None:
    if len(sample.labels) != len(spec.labels):
        raise ValueError(f"{spec.name} has labels {spec.labels}, not {sample.labels}")
    if isinstance(sample, HistogramSample) != (spec.kind == "histogram"):
        raise ValueError(f"{spec.name} is a {spec.kind}, which {type(sample).__name__} is not")
    if isinstance(sample, HistogramSample):
        rising = all(a[0] < b[0] and a[1] <= b[1] for a, b in pairwise(sample.buckets))
        if not sample.buckets or not rising or sample.buckets[-1][0] != math.inf:
            raise ValueError(f"{spec.name}{sample.labels} has buckets that do not rise to +Inf")


def _bucket(edge: float, count: int, exemplar: Exemplar | None) -> _Bucket:
    if exemplar is None:
        return _edge(edge), count
    shown = PrometheusExemplar(dict(exemplar.labels), exemplar.value, exemplar.timestamp)
    return _edge(edge), count, shown


def _edge(edge: float) -> str:
    return "+Inf" if math.isinf(edge) else repr(float(edge))


def _clean(value: str) -> str:
    """A label value that can be written as UTF-8: names from the kernel may hold undecodable bytes."""
    return value if value.isascii() else value.encode("utf-8", "replace").decode("utf-8")


def _relabelled(sample: AnySample, labels: _Labels) -> AnySample:
    if sample.labels == labels:
        return sample
    if isinstance(sample, HistogramSample):
        return replace(sample, labels=labels)
    return Sample(labels, sample.value)
