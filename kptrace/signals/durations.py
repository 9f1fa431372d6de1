# SPDX-License-Identifier: Apache-2.0
"""Histograms of rare, long things, counted in user space: rewrites, syncs, locks. Pure."""

import math
from bisect import bisect_left
from typing import Final

from kptrace.model.metrics import Exemplar, HistogramSample

#: Edges in seconds, 10 us to 30 min: 16 with +Inf.
REWRITE_LADDER: Final = (
    1e-5, 1e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 0.1, 0.25, 1.0, 5.0, 30.0, 300.0, 1800.0,
)  # fmt: skip


class Histogram:
    """Counts on a ladder of edges in seconds, an edge belonging to its bucket."""

    def __init__(self, ladder: tuple[float, ...] = REWRITE_LADDER) -> None:
        self._ladder = ladder
        self._counts = [0] * (len(ladder) + 1)
        self._sum_ns = 0
        self._exemplars: dict[float, Exemplar] = {}

    def add(self, duration_ns: int, exemplar: Exemplar | None = None) -> None:
        """Count one duration; its bucket points to the last one that came with an exemplar."""
        index = bisect_left(self._ladder, duration_ns / 1e9)
        self._counts[index] += 1
        self._sum_ns += duration_ns
        if exemplar is not None:
            self._exemplars[(*self._ladder, math.inf)[index]] = exemplar

    def sample(self, labels: tuple[str, ...]) -> HistogramSample:
        """The present state."""
        buckets, total = [], 0
        for edge, count in zip((*self._ladder, math.inf), self._counts, strict=True):
            total += count
            buckets.append((edge, total))
        return HistogramSample(labels, tuple(buckets), self._sum_ns / 1e9, dict(self._exemplars))
