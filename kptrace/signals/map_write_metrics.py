# SPDX-License-Identifier: Apache-2.0
"""The families of map writes, and the counts behind them. Written by the loop's thread, read by scrapes."""

from collections.abc import Iterable
from threading import Lock
from typing import Final

from kptrace.model.metrics import MetricFamily, MetricSpec
from kptrace.model.rewrite import Rewrite
from kptrace.signals import rewrite_metrics
from kptrace.signals.durations import Histogram
from kptrace.signals.map_write_records import MapWrite, WatchedMap
from kptrace.signals.rewrite_labels import TableNames

#: Edges in seconds: one write is a microsecond, a batch of thousands a few milliseconds.
WRITE_LADDER: Final = (1e-6, 2.5e-6, 5e-6, 1e-5, 2.5e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0)

CALL: Final = MetricSpec(
    "kptrace_map_write_duration_seconds",
    "histogram",
    "Duration of one bpf(2) call that wrote to a map of the BPF data plane, entry to exit, whoever made it. Mechanism"
    " tracepoint. Operation update_batch and delete_batch are calls for many entries. Outcome absent is a removal of what"
    " was not there, which is no failure.",
    ("map", "operation", "outcome"),
)
#: The families that are shared with rewrites of rules: of these, those whose label dataplane keeps the two apart.
SHARED: Final = (rewrite_metrics.DURATION, rewrite_metrics.OBJECTS)
SPECS: Final = (CALL, *SHARED)

_Labels = tuple[str, ...]


class MapWriteCounts:
    """Everything that is counted from map writes."""

    def __init__(self) -> None:
        """Count nothing yet."""
        self._names = TableNames()
        self._rewrites = rewrite_metrics.RewriteCounts(self._names)
        self._lock = Lock()
        self._calls: dict[_Labels, Histogram] = {}

    def add(self, call: MapWrite, map_: WatchedMap) -> None:
        """Count one call."""
        outcome = "failed" if call.failed else "absent" if call.absent else "committed"
        labels = (self._names.label(map_.name), call.command.name.lower(), outcome)
        with self._lock:
            histogram = self._calls.get(labels)
            if histogram is None:
                histogram = self._calls[labels] = Histogram(WRITE_LADDER)
            histogram.add(call.end_ns - call.begin_ns)

    def add_rewrite(self, rewrite: Rewrite) -> None:
        """Count a rewrite."""
        self._rewrites.add(rewrite)

    def families(self) -> Iterable[MetricFamily]:
        """The present values."""
        with self._lock:
            calls = [histogram.sample(labels) for labels, histogram in sorted(self._calls.items())]
        yield MetricFamily(CALL, calls)
        yield from (family for family in self._rewrites.families() if family.spec in SHARED)
