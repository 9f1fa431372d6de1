# SPDX-License-Identifier: Apache-2.0
"""The processes that are, or were a moment ago, steps of runs. No I/O; bounded."""

from collections import Counter, OrderedDict
from typing import Final

from kptrace.model.rewrite import Rewrite
from kptrace.signals.sync_run import GAP_NS
from kptrace.signals.sync_step import Step

MAX_PROCESSES: Final = 1024
#: Transactions that are remembered, so that each counts once.
MAX_SEEN: Final = 1024
#: A process is remembered that long after its end: a transaction of it may be told of late.
KEEP_NS: Final = 2 * GAP_NS


class Steps:
    """By process id; those of unknown family are loose, those that belong to no run are ignored."""

    def __init__(self, losses: Counter[str]) -> None:
        """None is known; `losses` is told of what is forgotten while it lives."""
        self._losses = losses
        self._all: OrderedDict[int, Step] = OrderedDict()
        self._loose: OrderedDict[int, Step] = OrderedDict()
        self._ignored: set[int] = set()
        self._seen: OrderedDict[tuple[int, int], None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._all) + len(self._loose) + len(self._ignored)

    def get(self, tgid: int) -> Step | None:
        """The present or last one of a process."""
        return self._all.get(tgid)

    def alive(self) -> list[Step]:
        """Those that have not ended."""
        return [step for step in self._all.values() if step.alive]

    def loose(self) -> list[Step]:
        """Those of unknown family, the oldest first."""
        return list(self._loose.values())

    def is_loose(self, step: Step) -> bool:
        """Whether its family is unknown."""
        return self._loose.get(step.tgid) is step

    def is_ignored(self, step: Step) -> bool:
        """Whether it belongs to no run."""
        return step.tgid in self._ignored

    def add(self, step: Step) -> None:
        """It began; those that ended are forgotten first if there are too many."""
        self._all[step.tgid] = step
        while len(self._all) > MAX_PROCESSES:
            oldest = next((each for each in self._all.values() if not each.alive), None)
            if oldest is None:
                oldest = next(iter(self._all.values()))
                self._losses["process_forgotten"] += 1
                oldest.end(None)
            self.forget(oldest)

    def loosen(self, step: Step) -> None:
        """Its family is unknown."""
        self._loose[step.tgid] = step

    def settle(self, step: Step) -> None:
        """Its family is known, or nothing more will tell it."""
        self._loose.pop(step.tgid, None)

    def ignore(self, step: Step) -> None:
        """It belongs to no run."""
        self._ignored.add(step.tgid)
        self.settle(step)

    def forget(self, step: Step) -> None:
        """It is of no more interest."""
        self._all.pop(step.tgid, None)
        self._ignored.discard(step.tgid)
        self.settle(step)

    def expire(self, now_ns: int) -> None:
        """Forget those that ended a while ago; the loose stay until they are settled."""
        for step in list(self._all.values()):
            if not step.alive and not self.is_loose(step) and now_ns - step.last_ns > KEEP_NS:
                self.forget(step)

    def first_time(self, rewrite: Rewrite) -> bool:
        """Whether this transaction was not told of before."""
        key = rewrite.run.tgid, rewrite.begin_ns
        if key in self._seen:
            return False
        self._seen[key] = None
        if len(self._seen) > MAX_SEEN:
            self._seen.popitem(last=False)
        return True
