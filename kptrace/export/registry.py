# SPDX-License-Identifier: Apache-2.0
"""Sources as one scrape: each isolated from the others, the number of series bounded."""

import gzip
import math
import time
from collections.abc import Callable, Iterable, Sequence
from threading import Lock

import structlog
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from kptrace.export.folding import fold
from kptrace.model.metrics import HistogramSample, MetricFamily, MetricSpec, Sample
from kptrace.model.signal import Source

SUCCESS = MetricSpec(
    "kptrace_collector_success",
    "gauge",
    "1 where the source could be read in this scrape, 0 where not.",
    ("collector",),
)
DURATION = MetricSpec(
    "kptrace_collector_duration_seconds",
    "gauge",
    "How long reading the source took in this scrape.",
    ("collector",),
)
SERIES = MetricSpec("kptrace_series", "gauge", "Series of this scrape, before the exporter's own.")
FOLDED = MetricSpec(
    "kptrace_series_folded_total",
    "counter",
    "Series that were folded into ~other, by metric; counted at each scrape.",
    ("metric",),
)
SPECS = (SUCCESS, DURATION, SERIES, FOLDED)


class Exporter:
    """A collector for prometheus_client's own registry, and the rendering of it."""

    def __init__(
        self,
        sources: Callable[[], Sequence[Source]],
        *,
        max_series: int = 4000,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Export what `sources` gives at each scrape; at most `max_series` series in all."""
        self._sources = sources
        self._max_series = max_series
        self._clock = clock
        self._log = structlog.get_logger()
        self._folded: dict[str, int] = {}
        self._lock = Lock()
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def render(self, accept: str, accept_encoding: str = "") -> tuple[bytes, dict[str, str]]:
        """One scrape: the body and its headers, in the format and encoding that the client accepts."""
        encoder, content_type = choose_encoder(accept)
        body = encoder(self._registry)
        headers = {"Content-Type": content_type}
        if "gzip" in accept_encoding:
            return gzip.compress(body, 1), {**headers, "Content-Encoding": "gzip"}
        return body, headers

    def describe(self) -> Iterable[Metric]:
        """Nothing: families are known only when sources are read."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """Read every source; one that raises is reported and the others go on."""
        families: list[MetricFamily] = []
        success: list[Sample] = []
        duration: list[Sample] = []
        for source in self._sources():
            begin = self._clock()
            try:
                families += list(source.families())
                fine = 1.0
            except Exception:  # noqa: BLE001  (logged and exposed: one source must not fail the scrape)
                self._log.exception("source_failed", source=source.name)
                fine = 0.0
            success.append(Sample((source.name,), fine))
            duration.append(Sample((source.name,), self._clock() - begin))
        shown, folded = fold(families, self._max_series)
        with self._lock:
            for name, count in folded.items():
                self._folded[name] = self._folded.get(name, 0) + count
            totals = [Sample((name,), float(count)) for name, count in sorted(self._folded.items())]
        series = sum(len(family.samples) for family in shown)
        own = [
            MetricFamily(SUCCESS, success),
            MetricFamily(DURATION, duration),
            MetricFamily(SERIES, [Sample((), float(series))]),
            MetricFamily(FOLDED, totals),
        ]
        return [to_prometheus(family) for family in [*shown, *own]]


def to_prometheus(family: MetricFamily) -> Metric:
    """A plain family as prometheus_client's."""
    spec = family.spec
    if spec.kind == "histogram":
        histogram = HistogramMetricFamily(spec.name, spec.help, labels=spec.labels)
        for sample in family.samples:
            assert isinstance(sample, HistogramSample)  # noqa: S101  (a source that breaks its own specification)
            edges = [("+Inf" if math.isinf(edge) else repr(edge), count) for edge, count in sample.buckets]
            histogram.add_metric(sample.labels, edges, sample.sum)
        return histogram
    kind = CounterMetricFamily if spec.kind == "counter" else GaugeMetricFamily
    metric = kind(spec.name, spec.help, labels=spec.labels)
    for sample in family.samples:
        assert isinstance(sample, Sample)  # noqa: S101  (as above)
        metric.add_metric(sample.labels, sample.value)
    return metric
