# SPDX-License-Identifier: Apache-2.0
"""The sync signal's families, and the counts behind them. Written by the loop's thread, read by scrapes."""

from collections.abc import Callable, Iterable, Mapping
from threading import Lock
from types import MappingProxyType
from typing import Final

from kptrace.model.metrics import Exemplar, MetricFamily, MetricSpec, Sample
from kptrace.model.rewrite import Outcome
from kptrace.signals.durations import Histogram
from kptrace.signals.sync_events import Phase, Sync

DURATION = MetricSpec(
    "kptrace_sync_duration_seconds",
    "histogram",
    "Duration of a writer's run around its rewrites: from the first process that it starts for it, or its own first netlink"
    " dump or transaction, to the exit of its last process, or its own clean-up of connections. Mechanism tracepoint."
    " kube-proxy's runs go from list to write,"
    " one for each family; any other writer's are bursts with at most 0.5 s of rest. Outcome failed: the writing process"
    " failed, or the kernel refused; empty: there was nothing to change.",
    ("dataplane", "family", "writer", "outcome"),
)
PHASE = MetricSpec(
    "kptrace_sync_phase_duration_seconds",
    "histogram",
    "What committed runs spent their time on; the phases of a run add up to it. list: reading what is installed, by tools"
    " or by netlink dumps of the writer's own. compute:"
    " the writer itself. write: exec of the writing process to its committing system call. commit: that call. teardown:"
    " from its return to the process's exit. lock_wait: the xtables lock. conntrack: clean-up of connections.",
    ("dataplane", "family", "writer", "phase"),
)
RUNNING = MetricSpec(
    "kptrace_sync_running_seconds",
    "gauge",
    "How long the longest run that is under way has been, 0 when there is none.",
    ("writer",),
)
LAST_SUCCESS = MetricSpec(
    "kptrace_sync_last_success_timestamp_seconds",
    "gauge",
    "When the last run ended that committed its changes, or had none, as Unix time.",
    ("dataplane", "family", "writer"),
)
SPECS: Final = (DURATION, PHASE, RUNNING, LAST_SUCCESS)

_Labels = tuple[str, ...]
_SUCCESS: Final = (Outcome.COMMITTED, Outcome.EMPTY)


class SyncCounts:
    """Everything that is counted of syncs. `publish` and `add` are for one thread, `families` for any."""

    def __init__(self, unix_time: Callable[[int], float]) -> None:
        """`unix_time` makes seconds since 1970 of CLOCK_MONOTONIC nanoseconds."""
        self._unix_time = unix_time
        self._lock = Lock()
        self._durations: dict[_Labels, Histogram] = {}
        self._phases: dict[_Labels, Histogram] = {}
        self._successes: dict[_Labels, float] = {}
        self._running: Mapping[str, int] = MappingProxyType({})
        self._writers: frozenset[str] = frozenset()

    def add(self, sync: Sync, record: str = "") -> None:
        """Count a run that is over; `record` is the flight recorder's number of it, if it has one."""
        ended = self._unix_time(sync.end_ns)
        exemplar = Exemplar({"record": record}, sync.duration_ns / 1e9, ended) if record else None
        where = sync.dataplane, sync.family, sync.writer
        with self._lock:
            self._writers |= {sync.writer}
            self._durations.setdefault((*where, sync.outcome.value), Histogram()).add(
                sync.duration_ns, exemplar
            )
            if sync.outcome in _SUCCESS:
                self._successes[where] = max(ended, self._successes.get(where, ended))
            if sync.outcome is Outcome.COMMITTED:
                for phase in Phase:
                    if phase in sync.phases:
                        histogram = self._phases.setdefault((*where, phase.value), Histogram())
                        histogram.add(sync.phases[phase])

    def publish(self, running: Mapping[str, int]) -> None:
        """Which runs are under way: their beginnings by class."""
        self._running = MappingProxyType(dict(running))

    def families(self, now_ns: int) -> Iterable[MetricFamily]:
        """The present values; `now_ns` is CLOCK_MONOTONIC."""
        running = self._running
        with self._lock:
            writers = sorted(self._writers | running.keys())
            durations = [histogram.sample(labels) for labels, histogram in sorted(self._durations.items())]
            phases = [histogram.sample(labels) for labels, histogram in sorted(self._phases.items())]
            successes = [Sample(labels, at) for labels, at in sorted(self._successes.items())]
        ages = [
            Sample((writer,), max(0, now_ns - running[writer]) / 1e9 if writer in running else 0.0)
            for writer in writers
        ]
        return (
            MetricFamily(DURATION, durations),
            MetricFamily(PHASE, phases),
            MetricFamily(RUNNING, ages),
            MetricFamily(LAST_SUCCESS, successes),
        )
