# SPDX-License-Identifier: Apache-2.0
"""The sync signal: writers' runs, from the process records and rewrites that others took from the kernel."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from kptrace.kernel.host import Host
from kptrace.model.metrics import MetricFamily, MetricSpec
from kptrace.model.rewrite import ProcessRun, Rewrite
from kptrace.model.signal import MechanismState, State
from kptrace.signals.process_records import Exec, Exit
from kptrace.signals.processes import ProcessTable, cgroup_path
from kptrace.signals.sync_events import Ended, Event, Phase, Span, Started, Sync, Wrote
from kptrace.signals.sync_metrics import SPECS, SyncCounts
from kptrace.signals.sync_owner import Owner, find_owner
from kptrace.signals.sync_reduce import SyncReducer
from kptrace.signals.sync_tools import find_tool
from kptrace.signals.writers import Writers

#: Runs that /status shows.
RECENT = 20


class SyncSignal:
    """Implements `kptrace.model.signal.Source`. All but `families` is for the loop's thread.

    Records come from several rings, each in its own order: they are put in order when they are settled, which is up to a
    moment before the first of the rings was read.
    """

    name = "sync"

    def __init__(
        self,
        watched: int,
        processes: Callable[[], ProcessTable],
        writers: Writers,
        host: Host = Host(),
        on_sync: Callable[[Sync], None] = lambda _: None,
        lost: Callable[[], Mapping[str, int]] = dict,
        clock: Callable[[], int] = time.monotonic_ns,
        record: Callable[[Sync], str] = lambda _: "",
    ) -> None:
        """Nothing is under way.

        Args:
            watched: inode of the watched network namespace.
            processes: who runs; every record is applied there before it comes here.
            writers: the classes.
            host: roots of procfs.
            on_sync: gets each run that is over.
            lost: process records that never came, by reason.
            clock: CLOCK_MONOTONIC.
            record: keeps a run that is worth it; returns the record's number, or nothing.
        """
        self._watched = watched
        self._processes = processes
        self._writers = writers
        self._proc = host.proc
        self._on_sync = on_sync
        self._records_lost = lost
        self._record = record
        self._clock = clock
        self._counts = SyncCounts(lambda at_ns: (time.time_ns() - clock() + at_ns) / 1e9)
        self._reducer = SyncReducer(self._take, lambda tgid: _exists(host.proc, tgid))
        self._waiting: list[Event] = []
        self._lost = 0
        self._last: deque[Sync] = deque(maxlen=RECENT)
        self._published: Mapping[str, int] = self._reducer.losses
        self._counts.publish({})

    def process(self, record: Exec | Exit) -> None:
        """A program began or ended, anywhere on the node."""
        if isinstance(record, Exit):
            self._waiting.append(Ended(record.tgid, record.at_ns, record.status))
        elif record.netns == self._watched and find_tool(record.filename, record.comm, record.arguments):
            owner = self._owner(record.tgid, record.parents)
            self._waiting.append(
                Started(
                    tgid=record.tgid,
                    at_ns=record.at_ns,
                    owner=owner.tgid,
                    writer=owner.writer,
                    executable=record.filename,
                    comm=record.comm,
                    arguments=record.arguments,
                )
            )

    def rewrite(self, rewrite: Rewrite) -> None:
        """A transaction in the watched namespace, of any outcome."""
        owner = self._owner(rewrite.run.tgid, writer=rewrite.writer)
        self._waiting.append(Wrote(rewrite, owner.tgid))

    def span(self, tgid: int, phase: Phase, begin_ns: int, end_ns: int, family: str = "") -> None:
        """A process in the watched namespace waited for the lock, dumped by netlink, or cleaned up connections."""
        owner = self._owner(tgid)
        self._waiting.append(Span(tgid, owner.tgid, owner.writer, phase, begin_ns, end_ns, family))

    def _owner(self, tgid: int, parents: Sequence[int] = (), writer: str = "") -> Owner:
        chain = self._processes().chain(tgid, parents)
        if not chain or chain[0].tgid != tgid:
            chain = [ProcessRun(tgid), *chain]
        return find_owner(chain, self._writers, self._cgroup, writer)

    def _cgroup(self, run: ProcessRun) -> str:
        return cgroup_path(self._proc, run.tgid)

    def settle(self, until_ns: int) -> None:
        """Everything up to `until_ns` was handed over, if it was not lost."""
        events = [each for each in self._waiting if each.at_ns <= until_ns]
        self._waiting = [each for each in self._waiting if each.at_ns > until_ns]
        lost = sum(self._records_lost().values())
        if lost > self._lost:
            self._lost = lost
            self._reducer.lost()
        self._reducer.apply(events)
        self._publish()

    def tick(self) -> None:
        """Close what is over by now; about twice a second, after `settle`."""
        self._reducer.tick(self._clock())
        self._publish()

    def began_ns(self, rewrite: Rewrite) -> int | None:
        """When the run began that a settled transaction belongs to; None if it is none's, or over for long."""
        return self._reducer.began_ns(rewrite)

    def running(self) -> Mapping[str, int]:
        """The beginning of the oldest run under way, by class of writer."""
        return self._reducer.running()

    def _take(self, sync: Sync) -> None:
        self._counts.add(sync, self._record(sync))
        self._last.append(sync)
        self._on_sync(sync)

    def _publish(self) -> None:
        self._counts.publish(self._reducer.running())
        self._published = self._reducer.losses

    def losses(self) -> Mapping[tuple[str, str], int]:
        """What was forgotten or missed by (signal, reason), all reasons from the start."""
        reasons = {**self._records_lost(), **self._published}
        return {(self.name, reason): count for reason, count in reasons.items()}

    def status(self, *, names: bool) -> Mapping[str, object]:
        """What /status shows of it: the last runs, the newest first."""
        return {"syncs": [_row(sync) for sync in reversed(self._last)]}

    def describe(self) -> Sequence[MetricSpec]:
        """See `Source`."""
        return SPECS

    def states(self) -> Sequence[MechanismState]:
        """See `Source`: it is there whenever the rewrite signal is."""
        return [MechanismState(self.name, "tracepoint", State.ACTIVE)]

    def families(self) -> Iterable[MetricFamily]:
        """See `Source`."""
        return self._counts.families(self._clock())


def _row(sync: Sync) -> Mapping[str, object]:
    where = {"dataplane": sync.dataplane, "family": sync.family, "writer": sync.writer}
    took = {phase.value: round(took / 1e6, 3) for phase, took in sync.phases.items()}
    return {**where, "outcome": sync.outcome.value, "ms": round(sync.duration_ns / 1e6, 3), "phases": took}


def _exists(proc: Path, tgid: int) -> bool:
    return (proc / str(tgid)).exists()
