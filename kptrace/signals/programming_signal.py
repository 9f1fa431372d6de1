# SPDX-License-Identifier: Apache-2.0
"""The programming signal: how long an API change takes to be true in the kernel, from what others have heard and traced."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Final, Protocol

from kptrace.identity.differences import Difference
from kptrace.model.metrics import MetricFamily, MetricSpec
from kptrace.model.rewrite import Outcome, Rewrite
from kptrace.model.signal import MechanismState, State
from kptrace.signals.clocks import unix_ns
from kptrace.signals.programming_account import ProgrammingAccount
from kptrace.signals.programming_commits import commits_of, failed_run
from kptrace.signals.programming_events import Result
from kptrace.signals.programming_metrics import SPECS
from kptrace.signals.sync_events import Sync
from kptrace.signals.writers import KUBE_PROXY

#: Rewrites with the copies of their bytes that wait until they are settled, half a second mostly: 4 MiB.
MAX_WAITING: Final = 1024
#: When a change is pending for so long and kube-proxy was never seen to commit, there may be none.
ABSENT_NS: Final = 60_000_000_000


class Runs(Protocol):
    """What is needed of writers' runs (`sync_signal.SyncSignal`)."""

    def began_ns(self, rewrite: Rewrite) -> int | None:
        """When the run began that a settled transaction belongs to, while the run is not over for long."""
        ...

    def running(self) -> Mapping[str, int]:
        """The beginning of the oldest run under way, by class of writer."""
        ...


class ProgrammingSignal:
    """Implements `kptrace.model.signal.Source`. Everything that is told it is told on the loop's thread."""

    name = "programming"

    def __init__(
        self,
        runs: Runs,
        listed: Callable[[], bool],
        *,
        node: str = "",
        lost: Callable[[], int] = lambda: 0,
        record: Callable[[Result], str] = lambda _: "",
        replaced: Callable[[], bool] = lambda: False,
        clock: Callable[[], int] = time.monotonic_ns,
        unix: Callable[[int], int] = unix_ns,
    ) -> None:
        """Nothing is pending.

        Args:
            runs: of writers.
            listed: whether what is to be programmed is known.
            node: this node's name, empty where unknown.
            lost: how many rewrites may have been missed so far.
            record: keeps a change that is worth it; returns the record's number, or nothing.
            replaced: whether another writer programs Services here: then kube-proxy need not.
            clock: CLOCK_MONOTONIC, ns.
            unix: the time since 1970 of a time by that clock, ns.
        """
        self._runs = runs
        self._listed = listed
        self._node = node
        self._lost = lost
        self._replaced = replaced
        self._clock = clock
        self._missed = lost()
        self._account = ProgrammingAccount(KUBE_PROXY, record, unix)
        self._waiting: deque[tuple[Rewrite, bytes]] = deque()
        self._over: dict[int, int] = {}
        self._failed: list[Sync] = []
        self._forgotten = 0

    def difference(self, difference: Difference) -> None:
        """A Service is to be programmed differently."""
        self._account.difference(difference)

    def _absent(self) -> bool:
        """Whether another writer is here, and kube-proxy was never seen to commit."""
        return not self._account.commits and self._replaced()

    def written(self, rewrite: Rewrite, data: bytes) -> None:
        """A transaction in the watched namespace, of any outcome, with the copy of its bytes."""
        if rewrite.writer != KUBE_PROXY:
            return
        if len(self._waiting) == MAX_WAITING:
            self._forgotten += 1
            self._account.lost()
            return
        self._waiting.append((rewrite, data))

    def synced(self, sync: Sync) -> None:
        """A writer's run is over."""
        if sync.writer != KUBE_PROXY:
            return
        self._over |= {id(commit): sync.begin_ns for commit in sync.commits}
        if sync.outcome is Outcome.FAILED:
            self._failed.append(sync)

    def settled(self, until_ns: int) -> None:
        """All runs are known up to this time."""
        missed = self._lost()
        if missed != self._missed:
            self._missed = missed
            self._account.lost()
        waiting, self._waiting = self._waiting, deque()
        for rewrite, data in waiting:
            if rewrite.end_ns > until_ns:
                self._waiting.append((rewrite, data))
                continue
            began = self._over.get(id(rewrite), self._runs.began_ns(rewrite))
            for commit in commits_of(rewrite, data, began):
                self._account.commit(commit)
        # Not before the runs' own transactions: those of a run that failed later are none that it made true.
        for sync in self._failed:
            run = failed_run(sync.dataplane, sync.family, sync.writer, sync.begin_ns, sync.end_ns)
            if run is not None:
                self._account.failed(run)
        self._over.clear()
        self._failed.clear()
        oldest = self._account.oldest_ns()
        if self._absent() and oldest is not None and until_ns - oldest > ABSENT_NS:
            self._account.reset()
        self._account.settled(until_ns, self._runs.running().get(KUBE_PROXY))

    def losses(self) -> Mapping[tuple[str, str], int]:
        """What was forgotten by (signal, reason), all reasons from the start."""
        return {(self.name, "rewrite_forgotten"): self._forgotten}

    def status(self, *, names: bool) -> Mapping[str, object]:
        """What /status shows of it."""
        section = {**self._account.section(self._clock()), "commits of kube-proxy": self._account.commits}
        return {"programming": section, "changes": self._account.rows(names=names)}

    def explain(self, namespace: str, name: str) -> Mapping[str, object]:
        """What is known of one Service: its last changes."""
        return {"changes": self._account.rows(names=True, of=(namespace, name))}

    def describe(self) -> Sequence[MetricSpec]:
        """See `Source`."""
        return SPECS

    def families(self) -> Iterable[MetricFamily]:
        """See `Source`. Nothing while nobody but another writer has programmed anything."""
        return () if self._absent() else self._account.families(self._clock())

    def states(self) -> Sequence[MechanismState]:
        """See `Source`."""
        row = MechanismState(self.name, "watch", State.ACTIVE)
        oldest = self._account.oldest_ns()
        if self._absent():
            detail = "another writer's service maps are here, and kube-proxy was never seen to commit"
            return [replace(row, state=State.OFF, reason="replaced", detail=detail)]
        if not self._listed():
            reason, detail = "starting", "Services, EndpointSlices and this node are not all listed yet"
        elif not self._account.commits and oldest is not None and self._clock() - oldest > ABSENT_NS:
            reason, detail = (
                "no_kube_proxy",
                "changes are pending, and kube-proxy was never seen to commit here",
            )
        elif not self._node:
            reason = "no_node_name"
            detail = "without --node-name no endpoint counts as local, and this node has no zone"
        else:
            return [row]
        return [replace(row, state=State.DEGRADED, reason=reason, detail=detail)]
