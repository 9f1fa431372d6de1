# SPDX-License-Identifier: Apache-2.0
"""From waits and holds to counts by the waiter's or holder's class. No I/O.

A lock is a file, so several processes in several network namespaces may share it: whoever holds it up counts, under the
class `other` where it is not in the watched namespace. A lock file that nobody in the watched namespace uses is a pod's
own and does not count.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from threading import Lock
from typing import Final

from kptrace.model.metrics import MetricFamily, MetricSpec, Sample
from kptrace.signals.durations import Histogram
from kptrace.signals.xtables_lock_records import REPEAT_NS, Kind, LockState

WAIT: Final = MetricSpec(
    "kptrace_xtables_lock_wait_seconds",
    "histogram",
    "How long a process waited for the xtables lock: entry of flock(2) to the return that gave it the lock. Attempts that"
    " failed and were repeated within 3 s are one wait; one that never got the lock is none. Mechanism tracepoint.",
    ("writer",),
)
HELD: Final = MetricSpec(
    "kptrace_xtables_lock_held_seconds",
    "histogram",
    "How long a process held the xtables lock: return of flock(2) to the unlock, the last close of the file, or the exit"
    " of the process. Mechanism tracepoint.",
    ("writer",),
)
CURRENT_HOLD: Final = MetricSpec(
    "kptrace_xtables_lock_current_hold_seconds",
    "gauge",
    "How long the xtables lock has been held now, 0 when it is not.",
    ("writer",),
)
LONGEST_WAIT: Final = MetricSpec(
    "kptrace_xtables_lock_longest_wait_seconds",
    "gauge",
    "How long the longest present wait for the xtables lock has been, 0 when nobody waits.",
    ("writer",),
)
SPECS: Final = (WAIT, HELD, CURRENT_HOLD, LONGEST_WAIT)

#: Lock files that are told apart; more than one is rare already.
MAX_FILES: Final = 64
#: Classes remembered between a lock's taking and its release: as many as the kernel side has holds.
MAX_NAMED: Final = 256

_Key = tuple[int, int]


class LockCounts:
    """Everything that is counted of the lock. `families` and `ages` may be asked on any thread, the rest on one."""

    def __init__(self, watched: int, writer: Callable[[LockState], str], files: Iterable[_Key] = ()) -> None:
        """Count nothing yet.

        Args:
            watched: inode of the watched network namespace.
            writer: the class of the process of a state.
            files: (device, inode) of the lock files that are known to be used in the watched namespace.
        """
        self._watched = watched
        self._writer = writer
        self._files: set[_Key] = set(files)
        self._lock = Lock()
        self._waits: dict[str, Histogram] = {}
        self._holds: dict[str, Histogram] = {}
        self._named: OrderedDict[_Key, str] = OrderedDict()

    def relevant(self, state: LockState) -> bool:
        """Whether a state is about a lock that the watched namespace uses."""
        key = state.device, state.inode
        if state.netns == self._watched and len(self._files) < MAX_FILES:
            self._files.add(key)
        return state.netns == self._watched or key in self._files

    def apply(self, record: LockState) -> None:
        """Count a wait or a hold that ended."""
        if not self.relevant(record):
            return
        # A hold begins when the wait for it ends: its class is known by then, and later its process may be gone.
        at = record.begin_ns if record.kind is Kind.HOLD else record.end_ns
        with self._lock:
            if record.kind is Kind.TAKEN and (record.file, record.begin_ns) in self._named:
                self._named[record.file, at] = self._named.pop((record.file, record.begin_ns))
            writer = self._name((record.file, at), record)
            histograms = self._holds if record.kind is Kind.HOLD else self._waits
            histograms.setdefault(writer, Histogram()).add(record.end_ns - record.begin_ns)
            if record.kind is Kind.HOLD:
                self._named.pop((record.file, at), None)

    def _name(self, key: _Key, state: LockState) -> str:
        writer = self._named.get(key)
        if writer is None:
            writer = self._named[key] = self._writer(state)
            while len(self._named) > MAX_NAMED:
                self._named.popitem(last=False)
        return writer

    def see(self, states: Iterable[LockState]) -> None:
        """Name who waits or holds now, while the processes are there."""
        for state in states:
            if self.relevant(state):
                with self._lock:
                    self._name((state.file, state.begin_ns), state)

    def families(
        self, waits: Iterable[LockState], holds: Iterable[LockState], now_ns: int
    ) -> list[MetricFamily]:
        """The present values.

        Args:
            waits: who waits now.
            holds: who holds a lock now.
            now_ns: CLOCK_MONOTONIC.
        """
        waiting, holding = list(waits), list(holds)
        with self._lock:
            return [
                MetricFamily(WAIT, [each.sample((name,)) for name, each in sorted(self._waits.items())]),
                MetricFamily(HELD, [each.sample((name,)) for name, each in sorted(self._holds.items())]),
                MetricFamily(CURRENT_HOLD, self._ages(holding, now_ns)),
                MetricFamily(LONGEST_WAIT, self._ages(waiting, now_ns)),
            ]

    def _ages(self, states: Iterable[LockState], now_ns: int) -> list[Sample]:
        longest = dict.fromkeys((*self._waits, *self._holds), 0)
        for state in states:
            writer = self._named.get((state.file, state.begin_ns))
            if writer is not None:
                longest[writer] = max(longest.get(writer, 0), now_ns - state.begin_ns)
        return [Sample((writer,), age / 1e9) for writer, age in sorted(longest.items())]


def still_waiting(
    waiting: Iterable[LockState], attempts: Iterable[LockState], now_ns: int
) -> list[LockState]:
    """Who waits: inside flock(2), or between two attempts."""
    return [*waiting, *(each for each in attempts if now_ns - each.end_ns < REPEAT_NS)]
