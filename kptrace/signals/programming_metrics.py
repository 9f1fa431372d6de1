# SPDX-License-Identifier: Apache-2.0
"""The programming signal's families, and the counts behind them. Written by the loop's thread, read by scrapes."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from threading import Lock
from types import MappingProxyType
from typing import Final

from kptrace.model.metrics import Exemplar, MetricFamily, MetricSpec, Sample
from kptrace.model.netfilter import IpFamily
from kptrace.signals.durations import Histogram
from kptrace.signals.programming_events import Change, Fate, Result
from kptrace.signals.programming_pending import Ages

DURATION = MetricSpec(
    "kptrace_programming_duration_seconds",
    "histogram",
    "From the arrival of the watch event's bytes on this node to the return of the system call that committed what it"
    " changed for this node: one sample for each Service port, IP family and endpoint, removals and what failed syncs"
    " delayed among them; a Service port that comes or goes, or one address of it, is one change. Attribution exact: the"
    " transaction's own bytes name it; inferred: the first of kube-proxy's runs that began after the event, or that began"
    " just before and no other followed. Of dataplane cilium the commit is the bpf(2) call after which the service's map"
    " entries say so: the last of those that a change needs.",
    ("dataplane", "family", "change", "attribution"),
)
SINCE_TRIGGER = MetricSpec(
    "kptrace_programming_since_trigger_seconds",
    "histogram",
    "From the time in the EndpointSlice's annotation endpoints.kubernetes.io/last-change-trigger-time, which another"
    " machine's clock gave, in whole seconds mostly, to the return of the committing system call; early commits among"
    " them. Only where an event brought a new annotation.",
    ("dataplane", "family", "change", "attribution"),
)
PENDING = MetricSpec(
    "kptrace_programming_pending",
    "gauge",
    "Changes that arrived and that no commit of the writer's has carried yet.",
    ("writer", "family"),
)
OLDEST = MetricSpec(
    "kptrace_programming_oldest_pending_seconds",
    "gauge",
    "How long ago the watch event of the oldest pending change arrived, 0 when there is none.",
    ("writer", "family"),
)
CHANGES = MetricSpec(
    "kptrace_programming_changes_total",
    "counter",
    "Changes that arrived: what the writer programs differently on this node after them. Equal to the samples of"
    " kptrace_programming_duration_seconds, early, superseded, unmeasured and pending ones together.",
    ("writer", "family", "change"),
)
EARLY = MetricSpec(
    "kptrace_programming_early_total",
    "counter",
    "Changes whose commit was over before their watch event arrived here, by at most 5 s: no sample.",
    ("dataplane", "family", "change"),
)
SUPERSEDED = MetricSpec(
    "kptrace_programming_superseded_total",
    "counter",
    "Changes that were undone, or went with their Service port, before a commit carried them: no sample.",
    ("writer", "family", "change"),
)
UNMEASURED = MetricSpec(
    "kptrace_programming_unmeasured_total",
    "counter",
    "Changes without a sample, because too many were pending (overflow), a list or a watch that had been broken told of"
    " them late (relisted), records of commits were lost (events_lost), a transaction's outcome is unknown"
    " (unknown_outcome), runs that began 5 minutes later did not write them (not_programmed), or the watch was given up"
    " (reset).",
    ("writer", "family", "change", "reason"),
)
TRIGGER_REJECTED = MetricSpec(
    "kptrace_programming_trigger_rejected_total",
    "counter",
    "Trigger times that are later than the commit (negative) or more than an hour before it (absurd): not in"
    " kptrace_programming_since_trigger_seconds. Clocks that differ are the usual cause.",
    ("writer", "reason"),
)
SPECS: Final = (
    DURATION, SINCE_TRIGGER, PENDING, OLDEST, CHANGES, EARLY, SUPERSEDED, UNMEASURED, TRIGGER_REJECTED
)  # fmt: skip

#: Edges in seconds: kube-proxy's second of rest between two runs lies between the seventh and the ninth.
PROGRAMMING_LADDER: Final = (
    5e-3, 2.5e-2, 5e-2, 0.1, 0.25, 0.5, 1.0, 1.5, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0,
)  # fmt: skip
#: Beyond, an annotation tells of something else.
LONGEST_TRIGGER_NS: Final = 3600 * 1_000_000_000
NEGATIVE, ABSURD = "negative", "absurd"

_Labels = tuple[str, ...]


class ProgrammingCounts:
    """Everything that is counted of changes. `add*` and `publish` are for one thread, `families` for any."""

    def __init__(self, writer: str, unix_ns: Callable[[int], int]) -> None:
        """Nothing was counted.

        Args:
            writer: class of the process that is to program the changes.
            unix_ns: makes nanoseconds since 1970 of CLOCK_MONOTONIC nanoseconds.
        """
        self._writer = writer
        self._unix_ns = unix_ns
        self._lock = Lock()
        self._histograms: dict[MetricSpec, dict[_Labels, Histogram]] = {DURATION: {}, SINCE_TRIGGER: {}}
        self._counters: dict[MetricSpec, Counter[_Labels]] = {
            spec: Counter() for spec in (CHANGES, EARLY, SUPERSEDED, UNMEASURED)
        }
        self._rejected: Counter[_Labels] = Counter({(writer, NEGATIVE): 0, (writer, ABSURD): 0})
        self._pending: Mapping[IpFamily, Ages] = MappingProxyType({})

    def add_change(self, change: Change) -> None:
        """Count a change that the correlator took in."""
        with self._lock:
            self._counters[CHANGES][self._writer, change.family.value, change.kind.value] += 1

    def add(self, result: Result, record: str = "") -> None:
        """Count the fate of a change; `record` is the flight recorder's number of it, if it has one."""
        what = result.change.family.value, result.change.kind.value
        with self._lock:
            if result.fate is Fate.SUPERSEDED:
                self._counters[SUPERSEDED][self._writer, *what] += 1
            elif result.fate is Fate.UNMEASURED:
                self._counters[UNMEASURED][self._writer, *what, result.reason or ""] += 1
            elif result.commit is not None:
                plane = result.commit.dataplane.value
                labels = (plane, *what, result.attribution or "")
                if result.fate is Fate.EARLY:
                    self._counters[EARLY][plane, *what] += 1
                else:
                    ended = self._unix_ns(result.commit.end_ns) / 1e9
                    exemplar = (
                        Exemplar({"record": record}, result.duration_ns / 1e9, ended) if record else None
                    )
                    self._observe(DURATION, labels, result.duration_ns, exemplar)
                self._add_trigger(result, labels)

    def publish(self, pending: Mapping[IpFamily, Ages]) -> None:
        """What is pending now."""
        self._pending = MappingProxyType(dict(pending))

    def families(self, now_ns: int) -> Iterable[MetricFamily]:
        """The present values; `now_ns` is CLOCK_MONOTONIC."""
        pending = self._pending
        with self._lock:
            found = [
                MetricFamily(spec, [each.sample(labels) for labels, each in sorted(known.items())])
                for spec, known in self._histograms.items()
            ]
            counters = [*self._counters.items(), (TRIGGER_REJECTED, self._rejected)]
            found += [
                MetricFamily(spec, [Sample(labels, float(count)) for labels, count in sorted(known.items())])
                for spec, known in counters
            ]
        ages = {(self._writer, family.value): each for family, each in pending.items()}
        counts = [Sample(labels, float(each.count)) for labels, each in ages.items()]
        oldest = [
            Sample(labels, max(0, now_ns - each.oldest_ns) / 1e9 if each.count else 0.0)
            for labels, each in ages.items()
        ]
        return (*found, MetricFamily(PENDING, counts), MetricFamily(OLDEST, oldest))

    def _observe(
        self, spec: MetricSpec, labels: _Labels, duration_ns: int, exemplar: Exemplar | None = None
    ) -> None:
        histogram = self._histograms[spec].setdefault(labels, Histogram(PROGRAMMING_LADDER))
        histogram.add(duration_ns, exemplar)

    def _add_trigger(self, result: Result, labels: _Labels) -> None:
        if not result.change.trigger_ns or result.commit is None:
            return
        since = self._unix_ns(result.commit.end_ns) - result.change.trigger_ns
        if since < 0:
            self._rejected[self._writer, NEGATIVE] += 1
        elif since > LONGEST_TRIGGER_NS:
            self._rejected[self._writer, ABSURD] += 1
        else:
            self._observe(SINCE_TRIGGER, labels, since)
