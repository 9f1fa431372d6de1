# SPDX-License-Identifier: Apache-2.0
"""From process events and rewrites to syncs. No I/O; everything is bounded, and what is forgotten is counted.

A step's lane needs its IP family. An iptables process tells it by its name and an `nft list` by its arguments, but an
`nft -f -` by its transaction only: until then, or until it ends without one, it is loose.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from kptrace.model.rewrite import Outcome, Rewrite
from kptrace.signals.rewrite_labels import NONE
from kptrace.signals.sync_events import Ended, Event, Phase, Span, Started, Sync, Wrote
from kptrace.signals.sync_noise import is_clean_up, is_noise
from kptrace.signals.sync_run import COMPUTE_NS, GAP_NS, kind_of
from kptrace.signals.sync_runs import MAX_WRITERS, Runs
from kptrace.signals.sync_step import Step
from kptrace.signals.sync_steps import Steps
from kptrace.signals.sync_tools import Kind, Role, Tool, find_tool
from kptrace.signals.writers import KUBE_PROXY

REASONS: Final = ("process_forgotten", "run_forgotten", "run_split", "exit_missed", "parts_forgotten")


class SyncReducer:
    """For one thread; `on_sync` is called from `apply` and `tick`."""

    def __init__(self, on_sync: Callable[[Sync], None], alive: Callable[[int], bool]) -> None:
        """Nothing is under way.

        Args:
            on_sync: gets each run once it is known to be over.
            alive: whether there is a process of this id.
        """
        self._alive = alive
        self._losses: Counter[str] = Counter(dict.fromkeys(REASONS, 0))
        self._runs = Runs(on_sync, self._losses)
        self._steps = Steps(self._losses)
        self._tried: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._steps) + len(self._runs)

    @property
    def losses(self) -> Mapping[str, int]:
        """What was forgotten or missed, by reason, all of `REASONS` from the start."""
        return dict(self._losses)

    def apply(self, events: Iterable[Event]) -> None:
        """Take events in, in the order of their times."""
        for event in sorted(events, key=lambda each: each.at_ns):
            match event:
                case Started():
                    self._started(event)
                case Ended():
                    self._ended(event)
                case Wrote():
                    self._wrote(event)
                case Span():
                    self._span(event)

    def lost(self) -> None:
        """Events were lost: what is under way now may lack some."""
        self._runs.doubt()

    def tick(self, now_ns: int) -> None:
        """Close what is over by now, and end what nobody told the end of."""
        for step in self._steps.alive():
            if now_ns - step.last_ns > GAP_NS and not self._alive(step.tgid):
                self._missed_exit(step)
        for step in self._steps.loose():
            if not step.alive and now_ns - step.last_ns > (GAP_NS if step.writes else COMPUTE_NS):
                self._give_up(step)
        self._runs.tick(now_ns, {step.owner for step in self._steps.loose() if step.alive})
        self._steps.expire(now_ns)

    def began_ns(self, rewrite: Rewrite) -> int | None:
        """When the run began that a transaction belongs to; None if it is no run's, or over for long."""
        return self._runs.began_ns(rewrite)

    def running(self) -> dict[str, int]:
        """The beginning of the oldest run under way, by class of writer."""
        found = self._runs.under_way()
        for step in self._steps.loose():
            if step.alive and step.tool.role is not Role.LIST:
                found[step.writer] = min(found.get(step.writer, step.begin_ns), step.begin_ns)
        return found

    def _started(self, event: Started) -> None:
        begin = event.at_ns
        before = self._steps.get(event.tgid)
        if before is not None:
            if begin <= before.begin_ns or (not before.alive and begin < before.last_ns):
                return  # told twice
            if before.alive and not before.commits and before.owner == event.owner:
                begin = min(begin, before.begin_ns)  # a wrapper that became the tool itself
                self._runs.take_back(before)
            elif before.alive:
                self._missed_exit(before)
            self._steps.forget(before)
        tool = find_tool(event.executable, event.comm, event.arguments)
        if tool is None:
            return
        step = Step(event.tgid, event.owner, event.writer, tool, begin)
        self._steps.add(step)
        if is_noise(step):
            self._ignore(step)
        elif tool.role is Role.CONNTRACK:
            self._runs.clean_up(step)
        elif tool.family:
            self._place(step, tool.family)
        else:
            self._steps.loosen(step)

    def _ignore(self, step: Step) -> None:
        self._steps.ignore(step)
        if step.tool.role is Role.DRY:
            self._tried[step.owner] = None
            if len(self._tried) > MAX_WRITERS:
                self._tried.popitem(last=False)
        elif step.tool.role is Role.TABLE:
            self._runs.drop(step)

    def _place(self, step: Step, family: str) -> None:
        self._steps.settle(step)
        if step.tool.role is Role.LIST:
            self._tried.pop(step.owner, None)
        if step.writes or step.tool.role is Role.LIST:
            self._adopt(step, family)
        self._runs.place(step, family)

    def _adopt(self, step: Step, family: str) -> None:
        """Loose steps that ended before this one are of its run: lists of unknown family, and writes that failed."""
        for other in self._steps.loose():
            if other.alive or other.owner != step.owner or other.tool.kind is not step.tool.kind:
                continue
            gap = step.begin_ns - other.last_ns
            wanted = other.writes is (step.tool.role is Role.LIST)
            if wanted and 0 <= gap <= (GAP_NS if other.writes else COMPUTE_NS):
                self._place(other, family)

    def _ended(self, event: Ended) -> None:
        step = self._steps.get(event.tgid)
        if step is not None and step.alive and event.at_ns >= step.begin_ns:
            self._end(step, event.at_ns, event.status)
        self._runs.owner_ended(event.tgid, event.at_ns)

    def _missed_exit(self, step: Step) -> None:
        self._losses["exit_missed"] += 1
        self._end(step, None, None)

    def _end(self, step: Step, at_ns: int | None, status: int | None) -> None:
        step.end(at_ns, status)
        if not self._steps.is_loose(step):
            return
        if step.tool.role is Role.UNKNOWN:
            role = Role.WRITE if step.failed else Role.LIST
            step.tool = Tool(step.tool.kind, role, step.tool.family)
        if step.tool.role is Role.LIST:
            return
        waiting = self._runs.waiting(step)
        if waiting is not None:
            self._place(step, waiting)
        elif step.writer == KUBE_PROXY and step.owner in self._tried:
            self._steps.ignore(step)  # the clean-up of a table that is not there
        elif step.writer != KUBE_PROXY:
            self._place(step, NONE)

    def _give_up(self, step: Step) -> None:
        if step.writes:
            self._place(step, NONE)
        self._steps.settle(step)

    def _wrote(self, event: Wrote) -> None:
        rewrite = event.rewrite
        if not self._steps.first_time(rewrite):
            return
        step = self._steps.get(rewrite.run.tgid)
        if step is None or rewrite.begin_ns < step.begin_ns:
            self._wrote_itself(event)
        elif self._steps.is_ignored(step):
            return
        elif rewrite.outcome is Outcome.CHECKED or (step.writer == KUBE_PROXY and is_clean_up(rewrite)):
            self._runs.take_back(step)
            self._steps.ignore(step)
        else:
            self._wrote_by(step, rewrite)

    def _wrote_by(self, step: Step, rewrite: Rewrite) -> None:
        if step.tool.role in (Role.LIST, Role.CHECK, Role.UNKNOWN):
            if rewrite.outcome is Outcome.EMPTY:
                return  # iptables-nft ends its reading with an empty batch
            step.tool = Tool(step.tool.kind, Role.WRITE, step.tool.family)
        step.wrote(rewrite)
        if step.overflow:
            self._losses["parts_forgotten"] += 1
        if step.writer != rewrite.writer:  # one program that is several writers
            self._runs.take_back(step)
            step.writer = rewrite.writer
            self._steps.loosen(step)
        if self._steps.is_loose(step) and rewrite.family != NONE:
            self._place(step, rewrite.family)

    def _wrote_itself(self, event: Wrote) -> None:
        rewrite, owner = event.rewrite, event.owner
        if rewrite.outcome is Outcome.CHECKED:
            return
        own = owner == rewrite.run.tgid
        tool = Tool(kind_of(rewrite), Role.WRITE)
        step = Step(rewrite.run.tgid, owner, rewrite.writer, tool, rewrite.begin_ns, own=own)
        step.wrote(rewrite)
        step.end(rewrite.end_ns)
        step.seen = own  # otherwise it is a process whose exec nobody saw
        if own:
            self._runs.born(owner, rewrite.run.started_ns)
        self._place(step, rewrite.family)

    def _span(self, event: Span) -> None:
        step = self._steps.get(event.tgid)
        if step is not None and step.begin_ns <= event.begin_ns:
            step.waited(event)
        elif event.phase is not Phase.LOCK_WAIT:
            role = Role.LIST if event.phase is Phase.LIST else Role.CONNTRACK
            if self._runs.goes_on(event, role):
                return
            tool = Tool(Kind.NFT, role, event.family, json=True)
            step = Step(event.tgid, event.owner, event.writer, tool, event.begin_ns, own=True)
            step.end(event.end_ns)
            if role is Role.CONNTRACK:
                self._runs.clean_up(step)
            elif event.family:
                self._place(step, event.family)
