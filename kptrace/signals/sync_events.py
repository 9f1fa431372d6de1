# SPDX-License-Identifier: Apache-2.0
"""What goes into the sync signal's reducer, and what comes out: plain data, times in ns of CLOCK_MONOTONIC. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from kptrace.model.rewrite import Outcome, Rewrite


class Phase(StrEnum):
    """What a writer's run spends its time on; each of its nanoseconds belongs to one.

    LIST: reading what is installed (`nft list`, `iptables-save`, `iptables -C`, netlink dumps of its own).
    COMPUTE: none of the others: the writer itself works, or waits.
    WRITE: exec of a writing process to the entry of its committing system call, and between two of them.
    COMMIT: the system call. TEARDOWN: from the last commit's return to the process's exit: `close` of its socket.
    LOCK_WAIT: flock(2) of the xtables lock; CONNTRACK: clean-up of stale connections. Both only where they are told of.
    """

    LIST = "list"
    COMPUTE = "compute"
    WRITE = "write"
    COMMIT = "commit"
    TEARDOWN = "teardown"
    LOCK_WAIT = "lock_wait"
    CONNTRACK = "conntrack"


@dataclass(frozen=True, slots=True)
class Started:
    """A process began to run a program in the watched network namespace.

    Attributes:
        tgid: the process.
        at_ns: when.
        owner: the process that it works for: the nearest ancestor that has a class, else its parent.
        writer: the class.
        executable: path, as it was asked for.
        comm: the kernel's name, which tells what the executable is where several have one file.
        arguments: argv, as far as the bounded copy goes; None if unknown.
    """

    tgid: int
    at_ns: int
    owner: int
    writer: str
    executable: str = ""
    comm: str = ""
    arguments: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Ended:
    """A process ended.

    Attributes:
        tgid: the process.
        at_ns: when; its file descriptors may be closed a little later.
        status: as wait(2) has it: a signal in the low seven bits, an exit code in the second byte; None if unknown.
    """

    tgid: int
    at_ns: int
    status: int | None = None


@dataclass(frozen=True, slots=True)
class Wrote:
    """A transaction, at the return of its system call, with the process that its process works for."""

    rewrite: Rewrite
    owner: int

    @property
    def at_ns(self) -> int:
        """When it was over."""
        return self.rewrite.end_ns


@dataclass(frozen=True, slots=True)
class Span:
    """Something that took time within a process: a netlink dump, a wait for the lock, a clean-up of connections.

    Attributes:
        tgid: the process.
        owner, writer: as in `Started`.
        phase: LIST, LOCK_WAIT or CONNTRACK.
        begin_ns, end_ns: when; the same where only the beginning is known.
        family: `ipv4` or `ipv6`, empty if unknown.
    """

    tgid: int
    owner: int
    writer: str
    phase: Phase
    begin_ns: int
    end_ns: int
    family: str = ""

    @property
    def at_ns(self) -> int:
        """When it was over."""
        return self.end_ns


Event = Started | Ended | Wrote | Span


@dataclass(frozen=True, slots=True)
class Sync:
    """A writer's run around its rewrites.

    Attributes:
        dataplane, family, writer: label values; `~none` where nothing told the family.
        owner: process id of the writer.
        begin_ns, end_ns: from the first thing that was seen of it to the last.
        outcome: committed, failed, empty or unknown.
        phases: nanoseconds by phase, those that took any; they add up to the run.
        commits: its transactions in order, those that failed or were empty among them.
        processes: how many it started.
        complete: False where the beginning or the end of a process is missing: time may be in the wrong phase, or lack.
    """

    dataplane: str
    family: str
    writer: str
    owner: int
    begin_ns: int
    end_ns: int
    outcome: Outcome
    phases: Mapping[Phase, int]
    commits: tuple[Rewrite, ...] = ()
    processes: int = 0
    complete: bool = True

    @property
    def duration_ns(self) -> int:
        """From the beginning to the end."""
        return self.end_ns - self.begin_ns
