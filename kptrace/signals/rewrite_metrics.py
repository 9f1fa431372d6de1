# SPDX-License-Identifier: Apache-2.0
"""The rewrite signal's families, and the counts behind them. Written by the loop's thread, read by scrapes."""

from collections import Counter
from collections.abc import Iterable
from threading import Lock
from typing import Final

from kptrace.model.metrics import MetricFamily, MetricSpec, Sample
from kptrace.model.rewrite import Outcome, Rewrite
from kptrace.signals.durations import Histogram
from kptrace.signals.rewrite_labels import TableNames

DURATION = MetricSpec(
    "kptrace_rewrite_duration_seconds",
    "histogram",
    "Duration of the system call that carried a transaction, entry to exit: sendmsg, sendto, sendmmsg, write or writev of"
    " an nfnetlink batch, setsockopt of a legacy table. Mechanism tracepoint, the watched namespace only. Outcome checked"
    " is a dry run, empty had nothing to change; it is never taken from a netlink call's result. Of dataplane cilium: first"
    " to last bpf(2) call of one process on the data plane's maps, or on its programs (table programs), less than 10 ms"
    " apart and within 60 s; failed where the kernel refused some and nothing was changed.",
    ("dataplane", "family", "table", "writer", "outcome"),
)
OBJECTS = MetricSpec(
    "kptrace_rewrite_objects_total",
    "counter",
    "Objects that committed batches named, as far as the bounded copy of each tells; flush is one for all it takes."
    " A legacy table is always replaced whole: object entry, operation replace. Of dataplane cilium: map entries that were"
    " written (add) or removed (delete), and programs that its agent loaded, attached, replaced or detached.",
    ("dataplane", "table", "object", "operation"),
)
TRUNCATED = MetricSpec(
    "kptrace_rewrite_truncated_total",
    "counter",
    "Committed batches longer than the copy: objects behind its end are not in kptrace_rewrite_objects_total.",
    ("dataplane",),
)
RULESET = MetricSpec(
    "kptrace_ruleset_objects",
    "gauge",
    "Chains, rules, named sets and their elements, by table; of legacy tables entries (rules, policies and chain ends)."
    " From a dump, kept up by batches, and dumped again where they do not tell enough.",
    ("dataplane", "family", "table", "object"),
)
EXACT = MetricSpec(
    "kptrace_ruleset_objects_exact",
    "gauge",
    "1 where kptrace_ruleset_objects follows every commit since the last dump, 0 where a new dump is due.",
)
GENERATION = MetricSpec(
    "kptrace_ruleset_generation",
    "gauge",
    "Generation of the watched namespace's nf_tables ruleset: it moves by one with every commit.",
)
RUNNING = MetricSpec(
    "kptrace_rewrite_running_seconds",
    "gauge",
    "How long the longest transaction that is under way has been, 0 when there is none.",
    ("writer",),
)
ELSEWHERE = MetricSpec(
    "kptrace_rewrite_other_netns_total",
    "counter",
    "Transactions in other network namespaces than the watched one.",
)
SPECS: Final = (DURATION, OBJECTS, TRUNCATED, RULESET, EXACT, GENERATION, RUNNING, ELSEWHERE)

_Labels = tuple[str, ...]


class RewriteCounts:
    """Everything that is counted from rewrites."""

    def __init__(self, names: TableNames) -> None:
        """`names` bounds the tables that are told apart."""
        self._names = names
        self._lock = Lock()
        self._durations: dict[_Labels, Histogram] = {}
        self._objects: Counter[_Labels] = Counter()
        self._truncated: Counter[_Labels] = Counter()
        self._elsewhere = 0

    def add(self, rewrite: Rewrite) -> None:
        """Count a rewrite in the watched namespace."""
        plane = rewrite.dataplane.value
        labels = (
            plane,
            rewrite.family,
            self._names.label(rewrite.table),
            rewrite.writer,
            rewrite.outcome.value,
        )
        with self._lock:
            self._durations.setdefault(labels, Histogram()).add(rewrite.end_ns - rewrite.begin_ns)
            if rewrite.outcome is not Outcome.COMMITTED:
                return
            if rewrite.truncated:
                self._truncated[(plane,)] += 1
            for each in rewrite.objects:
                key = (plane, self._names.label(each.table), each.object, each.operation)
                self._objects[key] += each.count

    def add_elsewhere(self) -> None:
        """Count a rewrite in another namespace."""
        with self._lock:
            self._elsewhere += 1

    def families(self) -> Iterable[MetricFamily]:
        """The present values."""
        with self._lock:
            durations = [histogram.sample(labels) for labels, histogram in sorted(self._durations.items())]
            objects = [Sample(labels, float(count)) for labels, count in sorted(self._objects.items())]
            truncated = [Sample(labels, float(count)) for labels, count in sorted(self._truncated.items())]
            elsewhere = float(self._elsewhere)
        return (
            MetricFamily(DURATION, durations),
            MetricFamily(OBJECTS, objects),
            MetricFamily(TRUNCATED, truncated),
            MetricFamily(ELSEWHERE, [Sample((), elsewhere)]),
        )
