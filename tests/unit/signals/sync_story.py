# SPDX-License-Identifier: Apache-2.0
"""A node's processes and transactions as short sentences, in milliseconds, for tests of the sync signal."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from kptrace.model.netfilter import DataPlane
from kptrace.model.rewrite import ObjectCount, Outcome, ProcessRun, Rewrite
from kptrace.signals.sync_events import Ended, Event, Phase, Span, Started, Sync, Wrote
from kptrace.signals.sync_reduce import SyncReducer

MS = 1_000_000
PROXY = 100
KILLED, FAILED, SEGFAULT = 9, 1 << 8, 139
KUBE_PROXY = "kube-proxy"
PATHS = {"nft": "/usr/sbin/nft"}


@dataclass
class Story:
    """Tells events to a reducer; all times are milliseconds.

    Attributes:
        owner, writer: whose processes the next ones are.
        syncs: what came out.
        alive: processes that live.
        told: every event.
        last: process id of the last process.
    """

    owner: int = PROXY
    writer: str = KUBE_PROXY
    syncs: list[Sync] = field(default_factory=list)
    alive: set[int] = field(default_factory=set)
    told: list[Event] = field(default_factory=list)
    last: int = 1000

    def __post_init__(self) -> None:
        """Nothing happened yet."""
        self.reducer = SyncReducer(self.syncs.append, self.alive.__contains__)

    def tell(self, *events: Event) -> None:
        """Hand events over."""
        self.told += events
        self.reducer.apply(events)

    def start(self, command: str, at: float, *, pid: int = 0, argv: bool = True) -> int:
        """A process begins; returns its id."""
        self.last = pid or self.last + 1
        words = command.split()
        name = words[0]
        self.alive.add(self.last)
        self.tell(
            Started(
                self.last,
                round(at * MS),
                self.owner,
                self.writer,
                PATHS.get(name, f"/usr/sbin/{name}"),
                name[:15],
                tuple(words) if argv else None,
            )
        )
        return self.last

    def end(self, pid: int, at: float, status: int | None = 0) -> None:
        """A process ends."""
        self.alive.discard(pid)
        self.tell(Ended(pid, round(at * MS), status))

    def run(
        self, command: str, begin: float, end: float, status: int | None = 0, *, argv: bool = True
    ) -> int:
        """A process from its beginning to its end."""
        pid = self.start(command, begin, argv=argv)
        self.end(pid, end, status)
        return pid

    def rewrite(
        self,
        pid: int,
        begin: float,
        end: float,
        family: str = "ipv4",
        plane: DataPlane = DataPlane.NFTABLES,
        outcome: Outcome = Outcome.COMMITTED,
        *,
        table: str = "kube-proxy",
        writer: str = "",
        objects: tuple[ObjectCount, ...] = (),
        exec_at: float = 0,
    ) -> Rewrite:
        """A transaction of a process, not told of yet."""
        return Rewrite(
            dataplane=plane,
            family=family,
            table=table,
            writer=writer or self.writer,
            run=ProcessRun(pid, started_ns=round(exec_at * MS)),
            begin_ns=round(begin * MS),
            end_ns=round(end * MS),
            size=100,
            outcome=outcome,
            objects=objects,
        )

    def commit(self, rewrite: Rewrite) -> Rewrite:
        """Tell of a transaction."""
        own = rewrite.run.tgid not in self.alive or rewrite.run.tgid == self.owner
        self.tell(Wrote(rewrite, rewrite.run.tgid if own else self.owner))
        return rewrite

    def span(self, pid: int, phase: Phase, begin: float, end: float, family: str = "") -> None:
        """Something that took time."""
        self.tell(Span(pid, self.owner, self.writer, phase, round(begin * MS), round(end * MS), family))

    def tick(self, at: float) -> list[Sync]:
        """Time passes; returns the syncs so far."""
        self.reducer.tick(round(at * MS))
        return self.syncs

    def running(self, now: float) -> dict[str, float]:
        """Milliseconds since the beginning of what is under way."""
        return {writer: now - begin / MS for writer, begin in self.reducer.running().items()}

    def nft_list(self, begin: float, end: float, family: str = "ip", status: int = 0) -> int:
        """kube-proxy lists its table."""
        return self.run(f"nft --json --terse list table {family} kube-proxy", begin, end, status)

    def nft_write(
        self,
        begin: float,
        commit: tuple[float, float] | None,
        end: float,
        family: str = "ipv4",
        status: int = 0,
        outcome: Outcome = Outcome.COMMITTED,
    ) -> Rewrite | None:
        """`nft -f -`, with its transaction if there is one."""
        pid = self.start("nft -f -", begin)
        told = self.commit(self.rewrite(pid, *commit, family, outcome=outcome)) if commit else None
        self.end(pid, end, status)
        return told

    def restore(
        self,
        begin: float,
        commits: Sequence[tuple[float, float]],
        end: float,
        *,
        plane: DataPlane = DataPlane.IPTABLES_LEGACY,
        six: bool = False,
        status: int = 0,
        outcomes: Sequence[Outcome] = (Outcome.COMMITTED, Outcome.COMMITTED),
        arguments: str = "-w 5 --noflush --counters",
    ) -> list[Rewrite]:
        """`iptables-restore` with its filter and nat transactions."""
        pid = self.start(f"ip{'6' * six}tables-restore {arguments}", begin)
        family = "ipv6" if six else "ipv4"
        made = [
            self.commit(self.rewrite(pid, *times, family, plane, outcome, table=table))
            for times, table, outcome in zip(commits, ("filter", "nat"), outcomes, strict=False)
        ]
        self.end(pid, end, status)
        return made


def phases(sync: Sync) -> dict[str, float]:
    """Milliseconds by phase; they must add up."""
    assert sum(sync.phases.values()) == sync.duration_ns
    return {phase.value: took / MS for phase, took in sync.phases.items()}


def times(sync: Sync) -> tuple[float, float]:
    """Beginning and end in milliseconds."""
    return sync.begin_ns / MS, sync.end_ns / MS


def summary(sync: Sync) -> tuple[str, str, str, str]:
    """The label values."""
    return sync.dataplane, sync.family, sync.writer, sync.outcome.value


def moved(rewrite: Rewrite, by: float) -> Rewrite:
    """The same transaction at another time."""
    return replace(
        rewrite, begin_ns=rewrite.begin_ns + round(by * MS), end_ns=rewrite.end_ns + round(by * MS)
    )
