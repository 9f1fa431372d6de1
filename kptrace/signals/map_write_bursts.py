# SPDX-License-Identifier: Apache-2.0
"""From calls to rewrites: what one process writes without a pause is one rewrite. Pure.

A data plane of BPF maps has no transactions. Its writer changes a Service by many small writes, one right after another:
from the first to the last of these is what a transaction is elsewhere. The pause that ends it is far longer than the
writer's work between two writes, and far shorter than its wait for the next change.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from kptrace.model.netfilter import DataPlane
from kptrace.model.rewrite import ObjectCount, Outcome, ProcessRun, Rewrite
from kptrace.signals.map_write_order import Call
from kptrace.signals.map_write_records import Command, MapWrite, Replacement, WatchedMap
from kptrace.signals.rewrite_labels import SEVERAL

GAP_NS: Final = 10_000_000
#: A writer that never pauses is cut.
LONGEST_NS: Final = 60_000_000_000
MOST_CALLS: Final = 1_000_000
#: Processes that write at the same time; beyond it the one that wrote first is taken for done.
MAX_OPEN: Final = 256

PROGRAMS: Final = "programs"
_INET: Final = "inet"
#: Keys in `Rewrite.details`: calls, refused ones, removals of what was not there, and whether a pause ended it.
CALLS, FAILED, ABSENT, CUT = "calls", "failed", "absent", "cut"

_PROGRAM_OPERATIONS: Final = {
    Command.UPDATE: "tail_call",
    Command.PROGRAM_LOAD: "load",
    Command.PROGRAM_ATTACH: "attach",
    Command.PROGRAM_DETACH: "detach",
    Command.LINK_CREATE: "attach",
    Command.LINK_UPDATE: "replace",
    Command.LINK_DETACH: "detach",
}

Who = Callable[[int], tuple[ProcessRun, str]]


class _Key(NamedTuple):
    tgid: int
    programs: bool


@dataclass(slots=True)
class _Burst:
    run: ProcessRun
    writer: str
    begin_ns: int
    end_ns: int
    size: int = 0
    calls: int = 0
    failed: int = 0
    absent: int = 0
    places: set[tuple[str, str]] = field(default_factory=set)
    done: Counter[tuple[str, str, str, str]] = field(default_factory=Counter)

    def rewrite(self, *, cut: bool) -> Rewrite:
        families, tables = {family for family, _ in self.places}, {table for _, table in self.places}
        details = {CALLS: self.calls, FAILED: self.failed, ABSENT: self.absent, CUT: int(cut)}
        objects = tuple(ObjectCount(*key, count) for key, count in sorted(self.done.items()) if count)
        return Rewrite(
            dataplane=DataPlane.CILIUM,
            family=families.pop() if len(families) == 1 else _INET,
            table=tables.pop() if len(tables) == 1 else SEVERAL,
            writer=self.writer,
            run=self.run,
            begin_ns=self.begin_ns,
            end_ns=self.end_ns,
            size=self.size,
            outcome=self._outcome(bool(objects)),
            objects=objects,
            details={name: str(count) for name, count in details.items() if count},
        )

    def _outcome(self, changed: bool) -> Outcome:
        if changed:
            return Outcome.COMMITTED
        # Removals of what is not there are a writer's habit, and no failure.
        return Outcome.FAILED if self.failed else Outcome.EMPTY


class Bursts:
    """Calls in the order in which they ended, joined by process.

    A process's writes to maps and what it does to programs are separate. Families that differ are `inet`.
    """

    def __init__(self, who: Who) -> None:
        """Nothing is open; `who` is asked for a process and its class when it begins to write."""
        self._who = who
        self._open: dict[_Key, _Burst] = {}

    def __len__(self) -> int:
        return len(self._open)

    def write(self, call: MapWrite, map_: WatchedMap) -> list[Rewrite]:
        """Take in a write to a map; the rewrites that are over."""
        finished, burst = self._at(_Key(call.tgid, programs=False), call)
        burst.places.add((map_.family, map_.name))
        operation = "add" if call.command.adds else "delete"
        burst.done[map_.family, map_.name, "map_entry", operation] += call.count
        burst.size += call.size
        burst.failed += call.failed
        burst.absent += call.absent
        return finished

    def replacement(self, call: Replacement) -> list[Rewrite]:
        """Take in what was done to a program; the rewrites that are over."""
        finished, burst = self._at(_Key(call.tgid, programs=True), call)
        burst.places.add((_INET, PROGRAMS))
        operation = _PROGRAM_OPERATIONS[call.command]
        burst.done[_INET, PROGRAMS, "program", operation] += not call.failed
        burst.failed += call.failed
        return finished

    def _at(self, key: _Key, call: Call) -> tuple[list[Rewrite], _Burst]:
        """The burst that a call belongs to, and those that end with it."""
        finished = []
        burst = self._open.get(key)
        if burst is not None:
            paused = call.begin_ns - burst.end_ns >= GAP_NS
            long = call.end_ns - burst.begin_ns > LONGEST_NS or burst.calls >= MOST_CALLS
            if paused or long:
                finished.append(self._open.pop(key).rewrite(cut=not paused))
                burst = None
        if burst is None:
            if len(self._open) >= MAX_OPEN:
                finished.append(self._open.pop(next(iter(self._open))).rewrite(cut=True))
            burst = self._open[key] = _Burst(*self._who(call.tgid), call.begin_ns, call.end_ns)
        burst.begin_ns = min(burst.begin_ns, call.begin_ns)
        burst.end_ns = max(burst.end_ns, call.end_ns)
        burst.calls += 1
        return finished, burst

    def settle(self, until_ns: int, under_way: Mapping[int, int]) -> list[Rewrite]:
        """The rewrites that are over, in the order in which they ended.

        Args:
            until_ns: all calls that ended by then were taken in.
            under_way: by process, when the first of its calls began that were not taken in.
        """
        over: list[Rewrite] = []
        for key, burst in list(self._open.items()):
            extended = under_way.get(key.tgid, until_ns) < burst.end_ns + GAP_NS
            paused = until_ns >= burst.end_ns + GAP_NS and not extended
            if paused or until_ns - burst.begin_ns > LONGEST_NS:
                over.append(self._open.pop(key).rewrite(cut=not paused))
        return sorted(over, key=lambda rewrite: rewrite.end_ns)


def first_begins(calls: Iterable[tuple[int, int]]) -> dict[int, int]:
    """By process the earliest of the times at which its calls began; `calls` are (tgid, begin_ns)."""
    first: dict[int, int] = {}
    for tgid, begin in calls:
        first[tgid] = min(begin, first.get(tgid, begin))
    return first
