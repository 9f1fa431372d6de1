# SPDX-License-Identifier: Apache-2.0
"""Metric families as plain data: what a signal produces and what `kptrace.export` turns into text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

Kind = Literal["counter", "gauge", "histogram", "info"]

#: What the excess of a bounded label set is folded into.
OTHER = "~other"


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """One metric's name, type, labels and meaning.

    Attributes:
        name: with unit and, for counters, `_total` (`kptrace_lookup_duration_seconds`); info metrics end in `_info`.
        kind: the Prometheus type. An `info` is exposed as a gauge of value 1.
        help: one or two sentences: where the interval starts and ends, on which mechanism.
        labels: label names, in the order of every sample's values.
    """

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Sample:
    """One counter, gauge or info value under its label values."""

    labels: tuple[str, ...]
    value: float


@dataclass(frozen=True, slots=True)
class Exemplar:
    """One observation that a histogram's bucket points to; only OpenMetrics shows it.

    Attributes:
        labels: names and values, 128 characters in all at most.
        value: in base units.
        timestamp: Unix time, seconds.
    """

    labels: Mapping[str, str]
    value: float
    timestamp: float


_NO_EXEMPLARS: Mapping[float, Exemplar] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class HistogramSample:
    """One histogram under its label values.

    Attributes:
        labels: values in the order of the specification's labels.
        buckets: `(le, cumulative count)`, ascending, the last `le` is `math.inf`: in base units, inclusive.
        sum: of all observations, in base units.
        exemplars: by the `le` of the bucket that the observation fell into.
    """

    labels: tuple[str, ...]
    buckets: tuple[tuple[float, int], ...]
    sum: float
    exemplars: Mapping[float, Exemplar] = field(default_factory=lambda: _NO_EXEMPLARS)

    @property
    def count(self) -> int:
        """The number of observations: what the last bucket holds."""
        return self.buckets[-1][1]


@dataclass(frozen=True, slots=True)
class MetricFamily:
    """A specification and its present samples."""

    spec: MetricSpec
    samples: Sequence[Sample | HistogramSample] = field(default=())
