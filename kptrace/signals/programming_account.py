# SPDX-License-Identifier: Apache-2.0
"""What one writer is to program: the changes, the commits that carry them, and what became of each."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Final

from kptrace.identity.differences import Difference
from kptrace.model.metrics import MetricFamily
from kptrace.model.netfilter import IpFamily
from kptrace.signals.clocks import unix_ns
from kptrace.signals.programming_changes import changes_between
from kptrace.signals.programming_correlate import Correlator
from kptrace.signals.programming_events import Commit, Result
from kptrace.signals.programming_metrics import ProgrammingCounts
from kptrace.signals.programming_pending import Ages
from kptrace.signals.programming_recent import RecentChanges

TICK_NS: Final = 1_000_000_000


class ProgrammingAccount:
    """All but `families`, `section` and `rows` is for one thread.

    Attributes:
        commits: how many were told.
    """

    def __init__(
        self,
        writer: str,
        record: Callable[[Result], str] = lambda _: "",
        unix: Callable[[int], int] = unix_ns,
    ) -> None:
        """Nothing is pending.

        Args:
            writer: class of the process whose commits count.
            record: keeps a change that is worth it; returns the record's number, or nothing.
            unix: the time since 1970 of a time of CLOCK_MONOTONIC, ns.
        """
        self.commits = 0
        self._record = record
        self._counts = ProgrammingCounts(writer, unix)
        self._recent = RecentChanges(unix)
        self._correlator = Correlator(self._take, writers=(writer,))
        self._totals: Counter[str] = Counter()
        self._ticked_ns = 0
        self._pending: Mapping[IpFamily, Ages] = MappingProxyType({})
        self._publish()

    def difference(self, difference: Difference) -> None:
        """A Service is to be programmed differently."""
        before, after = difference.before, difference.after
        for change in changes_between(before, after, difference.received_ns, difference.trigger_ns):
            new = (
                self._correlator.relisted([change]) > 0
                if difference.late
                else self._correlator.change(change)
            )
            if new:
                self._counts.add_change(change)

    def commit(self, commit: Commit) -> None:
        """A transaction of the writer's, or a run that failed without one."""
        self.commits += 1
        self._correlator.commit(commit)

    def failed(self, run: Commit) -> None:
        """A run of the writer's failed."""
        self._correlator.commit(run)

    def lost(self) -> None:
        """Commits may have been missed."""
        self._correlator.lost()

    def reset(self) -> None:
        """Nobody is to program what is pending."""
        self._correlator.reset()

    def settled(self, until_ns: int, running_ns: int | None = None) -> None:
        """All commits are known up to this time; `running_ns`: since when the writer's oldest run is under way."""
        if until_ns - self._ticked_ns >= TICK_NS:
            self._ticked_ns = until_ns
            self._correlator.tick(until_ns, running_ns)
            self._publish()

    def _take(self, result: Result) -> None:
        self._counts.add(result, self._record(result))
        self._recent.add(result)
        self._totals[result.fate] += 1
        if result.attribution is not None:
            self._totals[result.attribution] += 1

    def _publish(self) -> None:
        self._pending = self._correlator.ages()
        self._counts.publish(self._pending)

    def oldest_ns(self) -> int | None:
        """When the oldest pending change arrived, as last published; None without one."""
        return min((each.oldest_ns for each in self._pending.values() if each.count), default=None)

    def section(self, now_ns: int) -> dict[str, object]:
        """Figures for /status."""
        oldest, totals = self.oldest_ns(), self._totals.copy()
        return {
            "pending": sum(each.count for each in self._pending.values()),
            "oldest pending seconds": round((now_ns - oldest) / 1e9, 3) if oldest is not None else 0.0,
            **{name: totals[name] for name in ("programmed", "early", "superseded", "unmeasured")},
            "by the transaction's bytes (exact)": totals["exact"],
            "by time (inferred)": totals["inferred"],
        }

    def rows(self, *, names: bool, of: tuple[str, str] | None = None) -> list[Mapping[str, object]]:
        """The last changes, the newest first; see `RecentChanges.rows`."""
        return self._recent.rows(names=names, of=of)

    def families(self, now_ns: int) -> Iterable[MetricFamily]:
        """The present values."""
        return self._counts.families(now_ns)
