# SPDX-License-Identifier: Apache-2.0
"""A run that is under way: what belongs to it, when it is over, and what it was. No I/O.

kube-proxy's runs have a grammar, one for each of its tools (facts of 1.36, the same since 1.33):

    nft:       [nft -f -]  (nft --json list ...)+  nft -f -     the first one deletes stale chains
    iptables:  (iptables -N | -C | -I)*  [iptables-save]  iptables-restore

The last word ends the run. Where it lists by netlink of its own (1.37), that stands for `nft --json list`; where nothing
shows it, a run has one or two `nft -f -`. Any other writer's run is a burst: processes and transactions with no more than
`GAP_NS` between them.
"""

from collections.abc import Iterable
from typing import Final, NamedTuple

from kptrace.model.netfilter import DataPlane
from kptrace.model.rewrite import Outcome, Rewrite
from kptrace.signals.rewrite_labels import NONE
from kptrace.signals.sync_events import Phase, Sync
from kptrace.signals.sync_phases import Interval, divide
from kptrace.signals.sync_step import Step
from kptrace.signals.sync_tools import Kind, Role
from kptrace.signals.writers import KUBE_PROXY

#: Between two parts of a run, where the writer has nothing to compute.
GAP_NS: Final = 500_000_000
#: Between kube-proxy's list and its write: what it may take to compute the rules.
COMPUTE_NS: Final = 30_000_000_000
#: Processes, and transactions of the writer itself, in one run.
MAX_STEPS: Final = 256


class Lane(NamedTuple):
    """Runs of one lane follow one another; those of different lanes go on at the same time."""

    owner: int
    writer: str
    kind: Kind
    family: str


class Run:
    """One run of a lane."""

    def __init__(self, lane: Lane) -> None:
        """Nothing belongs to it yet."""
        self.lane = lane
        self.steps: list[Step] = []
        self.doubtful = False
        self._listed = False
        self._main: Step | None = None
        self._owner_ended: int | None = None
        self._life: tuple[int, int] | None = None

    @property
    def strict(self) -> bool:
        """Whether it follows kube-proxy's grammar."""
        return self.lane.writer == KUBE_PROXY and not any(step.own and step.commits for step in self.steps)

    @property
    def begin_ns(self) -> int:
        """The first that was seen of it."""
        return min(self._life[0] if self._life else step.begin_ns for step in self.steps)

    @property
    def last_ns(self) -> int:
        """The last that was seen of it."""
        return max(step.last_ns for step in self.steps)

    @property
    def alive(self) -> bool:
        """Whether one of its processes lives, as far as the grammar allows: kube-proxy writes when its list has ended."""
        after = self._main.begin_ns if self.strict and self._main else 0
        return any(step.alive for step in self.steps if step.begin_ns >= after)

    @property
    def over(self) -> bool:
        """Whether nothing more can belong to it but a clean-up of connections."""
        return self.strict and self._main is not None and not self._main.alive

    @property
    def awaits_write(self) -> bool:
        """Whether kube-proxy's list is there, and its write is not."""
        return self.strict and self._listed and self._main is None

    @property
    def under_way(self) -> bool:
        """Whether its writer is busy with it, as far as is known."""
        if self.strict:
            return not self.over
        return any(step.alive and step.tool.role is not Role.LIST for step in self.steps)

    def accepts(self, begin_ns: int) -> bool:
        """Whether a step that began then is of this run."""
        if len(self.steps) >= MAX_STEPS:
            return False
        if not self.strict:
            return self.alive or begin_ns - self.last_ns <= GAP_NS
        if self._main is not None or (self._owner_ended is not None and begin_ns > self._owner_ended):
            return False
        return self.alive or begin_ns - self.last_ns <= (COMPUTE_NS if self._listed else GAP_NS)

    def add(self, step: Step) -> None:
        """A step is of this run."""
        if step.tool.role in (Role.WRITE, Role.TABLE) or (self.lane.kind is Kind.NFT and step.commits):
            second = any(each.writes for each in self.steps)
            if self.lane.kind is Kind.IPTABLES or self._listed or second:
                self._main = step
        elif step.tool.role is Role.LIST:
            self._listed = True
        self.steps.append(step)

    def remove(self, step: Step) -> None:
        """It was not, after all."""
        self.steps.remove(step)
        if self._main is step:
            self._main = None

    def due(self, now_ns: int) -> bool:
        """Whether it can be closed."""
        if self.alive:
            return False
        quiet = now_ns - self.last_ns
        waits = self.awaits_write and self._owner_ended is None
        return quiet > (COMPUTE_NS if waits else GAP_NS)

    def owner_ended(self, at_ns: int, started_ns: int) -> None:
        """The writer itself is gone; its run is its whole life where that began at `started_ns`, not 0."""
        self._owner_ended = at_ns
        if started_ns and not self.strict:
            self._life = min(started_ns, self.begin_ns), max(at_ns, self.last_ns)

    def finish(self, dataplane: str) -> Sync | None:
        """What it was; None if it changed nothing, and did not mean to.

        Args:
            dataplane: label value where no transaction tells it.
        """
        if not self.steps:
            return None
        outcome = self._outcome()
        if outcome is None:
            return None
        begin, end = self._life or (self.begin_ns, self.last_ns)
        commits = sorted((each for step in self.steps for each in step.commits), key=lambda each: each.end_ns)
        committed = [each for each in commits if each.outcome is Outcome.COMMITTED] or commits
        last = committed[-1] if committed else None
        return Sync(
            dataplane=last.dataplane.value if last else dataplane,
            family=self.lane.family or NONE,
            writer=self.lane.writer,
            owner=self.lane.owner,
            begin_ns=begin,
            end_ns=end,
            outcome=outcome,
            phases=divide(begin, end, self._intervals(end)),
            commits=tuple(commits),
            processes=sum(not step.own for step in self.steps),
            complete=not self.doubtful and all(step.seen and not step.alive for step in self.steps),
        )

    def _outcome(self) -> Outcome | None:
        writing = [step for step in self.steps if step.writes]
        if writing:
            last = self._main or writing[-1]
            outcome = last.outcome
            if outcome is Outcome.EMPTY and self.doubtful and not last.commits:
                return Outcome.UNKNOWN
            if outcome in (Outcome.EMPTY, Outcome.UNKNOWN) and _any_committed(writing):
                return Outcome.COMMITTED
            return outcome
        if not self.strict:
            return None
        if self._owner_ended is not None or any(
            step.failed for step in self.steps if step.tool.role is Role.LIST
        ):
            return Outcome.FAILED
        # kube-proxy always writes after a list: that it did not means that nobody saw it.
        return Outcome.UNKNOWN if self._listed else None

    def _intervals(self, end: int) -> Iterable[Interval]:
        for step in self.steps:
            yield from step.intervals()
        if self.strict:
            own = [step for step in self.steps if step.own and step.tool.role is Role.LIST]
            if own:  # one list, of several dumps
                yield Interval(own[0].begin_ns, own[-1].last_ns, Phase.LIST)
        if self._life:
            yield Interval(self.last_ns, end, Phase.TEARDOWN)


def _any_committed(steps: Iterable[Step]) -> bool:
    return any(each.outcome is Outcome.COMMITTED for step in steps for each in step.commits)


def kind_of(rewrite: Rewrite) -> Kind:
    """The tools that a transaction could have come from."""
    legacy = rewrite.dataplane in (DataPlane.IPTABLES_LEGACY, DataPlane.IPTABLES_NFT)
    return Kind.IPTABLES if legacy else Kind.NFT
