# SPDX-License-Identifier: Apache-2.0
"""The flight recorder: the last slow or failed syncs and the slowest changes, each with all that is known of it."""

from collections import Counter, deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Final

from kptrace.dataplanes.told import EVERYTHING, Touched
from kptrace.model.identity import ServicePort
from kptrace.model.metrics import OTHER
from kptrace.model.rewrite import Outcome, Rewrite
from kptrace.signals.outliers import Limits, Outliers
from kptrace.signals.programming_events import Fate, Result
from kptrace.signals.sync_events import Sync

#: Records that are kept.
LIMIT: Final = 100
#: Transactions, and Service ports, that one record names.
MAX_COMMITS: Final = 32
MAX_SERVICES: Final = 32
#: Copies of transactions that are kept until their sync is over.
MAX_WRITTEN: Final = 64
#: To name Services costs an index of all of them: so many records are named in so long, since a writer may fail in a loop.
MAX_NAMED: Final = 5
NAMED_WITHIN_NS: Final = 10_000_000_000
#: Instead of names: any Service may have been touched, the bytes do not tell or were not asked.
ANY: Final = "~any"

SYNC_LIMITS: Final = Limits(least_ns=50_000_000, always_ns=5_000_000_000)
CHANGE_LIMITS: Final = Limits(least_ns=1_000_000_000, always_ns=10_000_000_000)

#: A transaction with the copy of its bytes.
Written = tuple[Rewrite, bytes]


@dataclass(frozen=True, slots=True)
class Record:
    """One sync or change.

    Attributes:
        id: a number, as text: what an exemplar's label `record` holds.
        kind: `sync` or `change`.
        why: `failed` or `slow`.
        at: Unix time of its end, seconds.
        fields: everything else, JSON values; without names of Services.
        services: the Services that it touched, `namespace/name:port/protocol`; `~other` for more, `~any` if unknown.
    """

    id: str
    kind: str
    why: str
    at: float
    fields: Mapping[str, object]
    services: tuple[str, ...] = ()

    def row(self, *, names: bool) -> dict[str, object]:
        """JSON values; names of Services only where `names`."""
        row = {"id": self.id, "kind": self.kind, "why": self.why, "at": self.at, **self.fields}
        return {**row, "services": list(self.services)} if names else row


class FlightRecorder:
    """`sync` and `change` are for the loop's thread, the rest for any."""

    def __init__(
        self,
        unix_ns: Callable[[int], int],
        touches: Callable[[Sequence[Written]], Touched] = lambda _written: EVERYTHING,
        limit: int = LIMIT,
    ) -> None:
        """Nothing is recorded.

        Args:
            unix_ns: makes nanoseconds since 1970 of CLOCK_MONOTONIC nanoseconds.
            touches: the Service ports that a record's transactions write, from their bytes.
            limit: records kept; then the oldest of those goes that there are most of, so that one writer that fails in
                a loop does not push out what others did.
        """
        self._unix_ns = unix_ns
        self._numbers = count(1)
        self._limit = limit
        self._records: list[tuple[Hashable, Record]] = []
        self._syncs = Outliers(SYNC_LIMITS)
        self._changes = Outliers(CHANGE_LIMITS)
        self._touches = touches
        self._written: deque[Written] = deque(maxlen=MAX_WRITTEN)
        self._named_ns: deque[int] = deque(maxlen=MAX_NAMED)

    def written(self, rewrite: Rewrite, data: bytes) -> None:
        """A transaction with the copy of its bytes, before its sync is over."""
        self._written.append((rewrite, data))

    def sync(self, sync: Sync) -> str:
        """Record a writer's run if it is worth it; returns the record's id, or nothing."""
        lane = sync.dataplane, sync.family, sync.writer
        usual = self._syncs.usual_ns(lane)
        failed = sync.outcome is Outcome.FAILED
        slow = not failed and self._syncs.judge(lane, sync.duration_ns)
        if not failed and not slow:
            return ""
        services = self._services(sync)
        fields = {
            "dataplane": sync.dataplane,
            "family": sync.family,
            "writer": sync.writer,
            "outcome": sync.outcome.value,
            "ms": _ms(sync.duration_ns),
            "usual ms": None if usual is None else _ms(usual),
            "processes": sync.processes,
            "complete": sync.complete,
            "phases": {phase.value: _ms(took) for phase, took in sync.phases.items()},
            "transactions": [_commit(sync, each) for each in sync.commits[:MAX_COMMITS]],
        }
        record = self._record("sync", "failed" if failed else "slow", sync.end_ns, fields, services)
        return self._keep(lane, record)

    def change(self, result: Result) -> str:
        """Record a change that took long to reach the kernel; returns the record's id, or nothing."""
        change, commit = result.change, result.commit
        if result.fate is not Fate.PROGRAMMED or commit is None:
            return ""
        lane = commit.dataplane, change.family
        usual = self._changes.usual_ns(lane)
        if not self._changes.judge(lane, result.duration_ns):
            return ""
        fields = {
            "dataplane": commit.dataplane.value,
            "family": change.family.value,
            "change": change.kind.value,
            "attribution": str(result.attribution or ""),
            "ms": _ms(result.duration_ns),
            "usual ms": None if usual is None else _ms(usual),
            "received": self._unix(change.received_ns),
            "run began ms after": _ms(commit.run_begin_ns - change.received_ns),
            "commit began ms after": _ms(commit.begin_ns - change.received_ns),
        }
        return self._keep(lane, self._record("change", "slow", commit.end_ns, fields, (_name(change.port),)))

    def rows(self, *, names: bool) -> list[dict[str, object]]:
        """All records as JSON values, the newest first."""
        return [record.row(names=names) for _, record in reversed(tuple(self._records))]

    def row(self, number: str) -> dict[str, object] | None:
        """One record with names; None if there is none of this id, or no longer."""
        return next((each.row(names=True) for _, each in tuple(self._records) if each.id == number), None)

    def _services(self, sync: Sync) -> tuple[str, ...]:
        commits = {id(commit) for commit in sync.commits}
        written = [each for each in self._written if id(each[0]) in commits]
        if not written:
            return ()
        named = self._named_ns
        if len(named) == named.maxlen and sync.end_ns - named[0] < NAMED_WITHIN_NS:
            return (ANY,)
        named.append(sync.end_ns)
        ports = self._touches(written)
        if ports is EVERYTHING:
            return (ANY,)
        names = sorted(map(_name, ports))
        return (*names[:MAX_SERVICES], *((OTHER,) if len(names) > MAX_SERVICES else ()))

    def _record(
        self, kind: str, why: str, at_ns: int, fields: Mapping[str, object], services: tuple[str, ...]
    ) -> Record:
        return Record(str(next(self._numbers)), kind, why, self._unix(at_ns), fields, services)

    def _keep(self, lane: Hashable, record: Record) -> str:
        lanes = [lane for lane, _ in self._records]
        if len(lanes) == self._limit:
            ((crowd, _),) = Counter(lanes).most_common(1)
            del self._records[lanes.index(crowd)]
        self._records.append((lane, record))
        return record.id

    def _unix(self, at_ns: int) -> float:
        return self._unix_ns(at_ns) / 1e9


def _commit(sync: Sync, rewrite: Rewrite) -> Mapping[str, object]:
    return {
        "table": rewrite.table,
        "outcome": rewrite.outcome.value,
        "began ms after": _ms(rewrite.begin_ns - sync.begin_ns),
        "ms": _ms(rewrite.end_ns - rewrite.begin_ns),
        "bytes": rewrite.size,
        "objects": {f"{each.object} {each.operation}": each.count for each in rewrite.objects},
        "generation": rewrite.generation,
        **rewrite.details,
    }


def _name(port: ServicePort) -> str:
    return f"{port.namespace}/{port.name}:{port.port}/{port.protocol.name.lower()}"


def _ms(duration_ns: int) -> float:
    return round(duration_ns / 1e6, 3)
