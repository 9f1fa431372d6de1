# SPDX-License-Identifier: Apache-2.0
"""All runs that are under way, at most one a lane. No I/O."""

from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterator
from typing import Final

from kptrace.model.netfilter import DataPlane
from kptrace.model.rewrite import Rewrite
from kptrace.signals.sync_events import Span, Sync
from kptrace.signals.sync_noise import opens
from kptrace.signals.sync_run import GAP_NS, MAX_STEPS, Lane, Run
from kptrace.signals.sync_step import Step
from kptrace.signals.sync_tools import Kind, Role

MAX_RUNS: Final = 64
#: Writers that something is remembered of beyond their runs.
MAX_WRITERS: Final = 256
#: A program that lives no longer than this, and ends with its writing, is one run.
LIFE_NS: Final = 60_000_000_000


class Runs:
    """Finds the run that a step belongs to, and closes those that are over."""

    def __init__(self, on_sync: Callable[[Sync], None], losses: Counter[str]) -> None:
        """None is under way.

        Args:
            on_sync: gets those that are over.
            losses: is told of what is forgotten.
        """
        self._on_sync = on_sync
        self._losses = losses
        self._open: OrderedDict[Lane, Run] = OrderedDict()
        self._home: dict[Step, Run] = {}
        self._planes: OrderedDict[tuple[int, Kind], DataPlane] = OrderedDict()
        self._births: OrderedDict[int, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._open)

    def place(self, step: Step, family: str) -> None:
        """A step belongs to the run of its lane, or begins one."""
        lane = Lane(step.owner, step.writer, step.tool.kind, family)
        run = self._open.get(lane)
        if run is not None and not run.accepts(step.begin_ns):
            if len(run.steps) >= MAX_STEPS:
                self._losses["run_split"] += 1
            self._close(run)
            run = None
        if run is None:
            if not opens(step):
                return
            run = self._open[lane] = Run(lane)
        self._add(run, step)
        while len(self._open) > MAX_RUNS:
            self._losses["run_forgotten"] += 1
            self._remove(next(iter(self._open.values())))

    def _add(self, run: Run, step: Step) -> None:
        run.add(step)
        self._home[step] = run

    def take_back(self, step: Step) -> None:
        """A step does not belong where it was placed, if it was."""
        run = self._home.pop(step, None)
        if run is not None:
            run.remove(step)
            if not run.steps:
                self._remove(run)

    def drop(self, step: Step) -> None:
        """The run of this step's lane is none."""
        run = self._open.get(Lane(step.owner, step.writer, step.tool.kind, step.tool.family))
        if run is not None:
            self._remove(run)

    def clean_up(self, step: Step) -> bool:
        """A clean-up of connections follows the run that its writer ended last; return whether there is one."""
        over = [run for run in self._of(step.owner) if run.over and step.tool.family in ("", run.lane.family)]
        run = max(over, key=lambda each: each.last_ns, default=None)
        if run is None or len(run.steps) >= MAX_STEPS or step.begin_ns - run.last_ns > GAP_NS:
            return False
        self._add(run, step)
        return True

    def goes_on(self, span: Span, role: Role) -> bool:
        """Whether what a writer does itself is more of the last thing in its run; then it is taken in there.

        kube-proxy does nothing else between the dumps of a list, nor between the deletions of a clean-up. Of others only
        what follows without a gap is the same: the rest of a dump that was told of while it lasted.
        """
        for run in self._of(span.owner):
            last = run.steps[-1]
            if last.own and last.tgid == span.tgid and last.tool.role is role and not last.commits:
                gap = span.begin_ns - last.last_ns
                if last.tool.family == span.family and 0 <= gap <= (GAP_NS if run.strict else 0):
                    last.end(span.end_ns)
                    return True
        return False

    def waiting(self, step: Step) -> str | None:
        """The family for which its writer's list was followed by no write yet, the oldest if there are several."""
        waiting = [
            run
            for run in self._of(step.owner)
            if run.lane.kind is step.tool.kind
            and run.awaits_write
            and not run.alive
            and run.last_ns <= step.begin_ns
        ]
        oldest = min(waiting, key=lambda each: each.last_ns, default=None)
        return oldest.lane.family if oldest else None

    def _of(self, owner: int) -> Iterator[Run]:
        return (run for run in self._open.values() if run.lane.owner == owner)

    def born(self, owner: int, started_ns: int) -> None:
        """A writer writes itself, and began at that time, 0 if unknown."""
        self._births.setdefault(owner, started_ns)
        while len(self._births) > MAX_WRITERS:
            self._births.popitem(last=False)

    def owner_ended(self, owner: int, at_ns: int) -> None:
        """A process ended that may be a writer."""
        born = self._births.pop(owner, 0)
        for run in self._of(owner):
            near = at_ns - run.last_ns <= GAP_NS and run.begin_ns - born <= LIFE_NS
            run.owner_ended(at_ns, born if near and all(step.own for step in run.steps) else 0)

    def doubt(self) -> None:
        """Events were lost that may belong to any of them."""
        for run in self._open.values():
            run.doubtful = True

    def tick(self, now_ns: int, busy: Collection[int]) -> None:
        """Close what is over; kube-proxy's is not while it is among the `busy`, whose write is not placed yet."""
        for run in list(self._open.values()):
            unplaced = run.strict and not run.over and run.lane.owner in busy
            if not unplaced and run.due(now_ns):
                self._close(run)

    def _close(self, run: Run) -> None:
        self._remove(run)
        if any(step.own for step in run.steps) and run.lane.owner in self._births:
            self._births[run.lane.owner] = 0
        kind = run.lane.kind
        default = DataPlane.NFTABLES if kind is Kind.NFT else DataPlane.OTHER
        key = run.lane.owner, kind
        sync = run.finish(self._planes.get(key, default).value)
        if sync is None:
            return
        if sync.commits:
            self._planes[key] = sync.commits[-1].dataplane
            self._planes.move_to_end(key)
            while len(self._planes) > MAX_WRITERS:
                self._planes.popitem(last=False)
        self._on_sync(sync)

    def _remove(self, run: Run) -> None:
        self._open.pop(run.lane, None)
        for step in run.steps:
            self._home.pop(step, None)

    def began_ns(self, rewrite: Rewrite) -> int | None:
        """When the run began that a transaction belongs to."""
        for step, run in self._home.items():
            if any(each is rewrite for each in step.commits):
                return run.begin_ns
        return None

    def under_way(self) -> dict[str, int]:
        """The beginning of the oldest that its writer is busy with, by class."""
        found: dict[str, int] = {}
        for run in self._open.values():
            if run.under_way:
                found[run.lane.writer] = min(found.get(run.lane.writer, run.begin_ns), run.begin_ns)
        return found
