# SPDX-License-Identifier: Apache-2.0
"""Transactions under way: a sync that takes a quarter of an hour is seen while it lasts."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Protocol

from kptrace.model.metrics import Sample
from kptrace.signals.rewrite_kernel import Running


class Transactions(Protocol):
    """The kernel's own list (`rewrite_kernel.RewriteKernel`)."""

    def running(self) -> Iterable[Running]:
        """What is under way."""
        ...

    def forget(self, run: Running) -> None:
        """Remove one whose thread is gone."""
        ...


class RunningRewrites:
    """Who has how long been writing into the watched namespace.

    `tick` and `saw` are for the loop's thread; `ages` may be asked on any.
    """

    def __init__(
        self,
        transactions: Transactions,
        watched: int,
        alive: Callable[[int], bool],
        writer: Callable[[int], str],
    ) -> None:
        """Watch.

        Args:
            transactions: the kernel's list.
            watched: inode of the watched network namespace.
            alive: whether there is a process of this id.
            writer: the class of a process.
        """
        self._transactions = transactions
        self._watched = watched
        self._alive = alive
        self._writer = writer
        self._named: Mapping[tuple[int, int], str] = MappingProxyType({})
        self._seen: frozenset[str] = frozenset()

    def _here(self) -> Iterator[Running]:
        return (run for run in self._transactions.running() if run.netns == self._watched)

    def busy(self) -> bool:
        """Whether any is under way in the watched namespace."""
        return any(True for _ in self._here())

    def saw(self, writer: str) -> None:
        """This class writes here: its gauge is 0 when it does not."""
        if writer not in self._seen:
            self._seen |= {writer}

    def tick(self) -> None:
        """Name those that are new, and forget those whose process is gone."""
        named: dict[tuple[int, int], str] = {}
        for run in self._transactions.running():
            if not self._alive(run.tgid):
                self._transactions.forget(run)
            elif run.netns == self._watched:
                key = (run.tid, run.begin_ns)
                named[key] = self._named.get(key) or self._writer(run.tgid)
                self.saw(named[key])
        self._named = MappingProxyType(named)

    def ages(self, now_ns: int) -> list[Sample]:
        """Seconds of the longest of each class, 0 where there is none; those younger than a tick have no class yet."""
        named, longest = self._named, dict.fromkeys(self._seen, 0)
        for run in self._here() if named else ():
            writer = named.get((run.tid, run.begin_ns))
            if writer is not None:
                longest[writer] = max(longest.get(writer, 0), now_ns - run.begin_ns)
        return [Sample((writer,), age / 1e9) for writer, age in sorted(longest.items())]
