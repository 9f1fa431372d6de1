# SPDX-License-Identifier: Apache-2.0
"""From changes and commits to the fate of each change. No I/O, no clock; for one thread.

kube-proxy takes what it has heard when its run begins. A commit whose bytes show the change carries it, whenever it was
heard; where they do not tell, one whose run began after the event does. Our watch and kube-proxy's are told at the same
time, so about half of all runs on a quiet node begin a little before the event arrives here. Such a commit is remembered:
if kube-proxy, which waits a second at most between runs while it has something to do, does not run again for `LOOK_BACK_NS`,
that commit was it.
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Final

from kptrace.model.netfilter import IpFamily
from kptrace.model.rewrite import Outcome
from kptrace.signals.programming_events import (
    Attribution,
    Change,
    ChangeKind,
    Commit,
    Fate,
    Reason,
    Result,
    Subject,
)
from kptrace.signals.programming_judge import Verdict, judge
from kptrace.signals.programming_pending import MAX_PENDING, Ages, Pending, Waiting
from kptrace.signals.writers import KUBE_PROXY

#: How much sooner than we kube-proxy may hear of a change, and commit it.
LOOK_BACK_NS: Final = 5_000_000_000
#: How much later: a run that begins so long after the event, succeeds, and does not write the change never will.
PATIENCE_NS: Final = 300_000_000_000
#: Commits that are looked back at, and subjects whose last change is remembered.
MAX_COMMITS: Final = 64
MAX_SETTLED: Final = 4096

_CARRIERS: Final = (Outcome.COMMITTED, Outcome.EMPTY)


class Correlator:
    """`on_result` gets the fate of each change once, from any method but `ages`."""

    def __init__(
        self,
        on_result: Callable[[Result], None],
        *,
        writers: Collection[str] = (KUBE_PROXY,),
        limit: int = MAX_PENDING,
    ) -> None:
        """Nothing is pending.

        Args:
            on_result: see above.
            writers: classes of processes whose commits count.
            limit: of changes that are pending.
        """
        self._on_result = on_result
        self._writers = frozenset(writers)
        self._pending = Pending(limit)
        self._commits: deque[Commit] = deque(maxlen=MAX_COMMITS)
        self._settled: OrderedDict[Subject, tuple[ChangeKind, int]] = OrderedDict()
        self._failed_ns: dict[IpFamily, int] = {}
        self._newest_ns: dict[IpFamily, int] = {}

    def __len__(self) -> int:
        return len(self._pending)

    def ages(self) -> Mapping[IpFamily, Ages]:
        """What is pending."""
        return self._pending.ages()

    def change(self, change: Change) -> bool:
        """Take in a change. Returns whether it is one: not so what is pending already, or was told before."""
        if not self._is_new(change):
            return False
        if self._undoes(change):
            return True
        waiting = Waiting(change)
        if self._look_back(waiting):
            return True
        if self._pending.full:
            self._settle(change, Fate.UNMEASURED, reason=Reason.OVERFLOW)
        else:
            self._pending.add(waiting)
        return True

    def relisted(self, changes: Iterable[Change]) -> int:
        """Take in what a list shows to have changed while nobody told. Returns how many are changes.

        When they happened is not known, so they are not measured; but they undo what is pending. What is pending and
        confirmed by the list stays so, with the time at which it was first heard of.
        """
        count = 0
        for change in changes:
            if self._is_new(change):
                count += 1
                if not self._undoes(change):
                    self._settle(change, Fate.UNMEASURED, reason=Reason.RELISTED)
        return count

    def commit(self, commit: Commit) -> None:
        """Take in a transaction, or a run that failed without one; in whatever order, also twice."""
        if commit.writer not in self._writers or commit in self._commits:
            return
        if commit.outcome is Outcome.FAILED:
            self._failed_ns[commit.family] = max(commit.end_ns, self._failed_ns.get(commit.family, 0))
            for _, waiting in self._pending.of_family(commit.family):
                if waiting.perhaps is not None and waiting.perhaps.end_ns <= commit.end_ns:
                    waiting.perhaps = None  # what was in the failed run comes with the next one
        elif commit.outcome is not Outcome.CHECKED:
            self._commits.append(commit)
            newest = max(commit.run_begin_ns, self._newest_ns.get(commit.family, 0))
            self._newest_ns[commit.family] = newest
            for group, waiting in self._pending.of_ports(commit.family, commit.only):
                self._consider(waiting, commit, bare=group.bare)

    def lost(self) -> None:
        """Commits may have been missed: whatever is pending may be true already."""
        self._give_up(Reason.EVENTS_LOST)

    def reset(self) -> None:
        """The watch is given up: what is pending may have been undone."""
        self._give_up(Reason.RESET)
        self._settled.clear()

    def tick(self, now_ns: int, running_ns: int | None = None) -> None:
        """Settle what no other run came for.

        Args:
            now_ns: now.
            running_ns: when the writer's oldest run began that is under way now, None without one.
        """
        while self._commits and self._commits[0].end_ns < now_ns - 2 * LOOK_BACK_NS:
            self._commits.popleft()
        for waiting in self._pending.every():
            commit, change = waiting.perhaps, waiting.change
            if commit is None and self._newest_ns.get(change.family, 0) - change.received_ns >= PATIENCE_NS:
                # The commits since then were not even asked: they were of other Service ports.
                self._settle(change, Fate.UNMEASURED, reason=Reason.NOT_PROGRAMMED)
            if commit is None or (running_ns is not None and running_ns > commit.run_begin_ns):
                continue
            if now_ns - max(commit.end_ns, change.received_ns) >= LOOK_BACK_NS:
                self._carry(waiting, commit, Attribution.INFERRED)

    def _is_new(self, change: Change) -> bool:
        self._pending.tell_bare(change)
        waiting = self._pending.get(change.subject)
        if waiting is not None:
            return waiting.change.kind is not change.kind
        kind, at = self._settled.get(change.subject, (None, 0))
        return kind is not change.kind or change.received_ns > at

    def _undoes(self, change: Change) -> bool:
        """Whether the change undoes a pending one, or is undone by one that was told before it."""
        if change.whole and not change.kind.added:
            for waiting in self._pending.of_port(change.family, change.port):
                if not waiting.change.whole:
                    self._settle(waiting.change, Fate.SUPERSEDED)
        opposite = self._pending.get(change.subject)
        if opposite is not None:
            self._settle(opposite.change, Fate.SUPERSEDED)
        elif change.received_ns >= self._settled.get(change.subject, (None, 0))[1]:
            return False
        self._settle(change, Fate.SUPERSEDED)
        return True

    def _look_back(self, waiting: Waiting) -> bool:
        """Whether a commit that was told before the change carries it."""
        change = waiting.change
        known = sorted(
            (each for each in self._commits if each.family is change.family), key=lambda each: each.end_ns
        )
        start = 0
        for place, commit in enumerate(known):
            # What was true before the newest commit that shows otherwise is not any more.
            if commit.end_ns < change.received_ns and commit.outcome in _CARRIERS:
                lacks = judge(change, commit, bare=change.bare).verdict is Verdict.LACKS
                start = place + 1 if lacks else start
        return any(self._consider(waiting, commit, bare=change.bare) for commit in known[start:])

    def _consider(self, waiting: Waiting, commit: Commit, *, bare: bool) -> bool:
        """Settle a change if the commit carries it; returns whether it did."""
        change = waiting.change
        if change.received_ns - commit.end_ns > LOOK_BACK_NS:
            return False
        verdict, attribution = judge(change, commit, bare=bare)
        if verdict is Verdict.CARRIES:
            if commit.outcome in _CARRIERS:
                self._carry(waiting, commit, attribution)
            else:
                self._settle(change, Fate.UNMEASURED, reason=Reason.UNKNOWN_OUTCOME)
            return True
        if commit.outcome not in _CARRIERS:
            return False
        if verdict is Verdict.PERHAPS:
            newest = waiting.perhaps is None or commit.end_ns > waiting.perhaps.end_ns
            if newest and commit.end_ns > self._failed_ns.get(change.family, 0):
                waiting.perhaps = commit
        elif commit.run_begin_ns - change.received_ns >= PATIENCE_NS:
            self._settle(change, Fate.UNMEASURED, reason=Reason.NOT_PROGRAMMED)
            return True
        elif verdict is Verdict.LACKS and waiting.perhaps and commit.end_ns > waiting.perhaps.end_ns:
            waiting.perhaps = None
        return False

    def _carry(self, waiting: Waiting, commit: Commit, attribution: Attribution) -> None:
        early = commit.end_ns < waiting.change.received_ns
        self._settle(waiting.change, Fate.EARLY if early else Fate.PROGRAMMED, commit, attribution)

    def _give_up(self, reason: Reason) -> None:
        for waiting in self._pending.every():
            self._settle(waiting.change, Fate.UNMEASURED, reason=reason)
        self._commits.clear()

    def _settle(
        self,
        change: Change,
        fate: Fate,
        commit: Commit | None = None,
        attribution: Attribution | None = None,
        reason: Reason | None = None,
    ) -> None:
        self._pending.remove(change.subject)
        _, before = self._settled.get(change.subject, (None, 0))
        if change.received_ns >= before:
            self._settled[change.subject] = change.kind, change.received_ns
            self._settled.move_to_end(change.subject)
            if len(self._settled) > MAX_SETTLED:
                self._settled.popitem(last=False)
        self._on_result(Result(change, fate, commit, attribution, reason))
