# SPDX-License-Identifier: Apache-2.0
"""One kernel transaction that changes rules, and the process that caused it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from kptrace.model.netfilter import DataPlane


class Outcome(StrEnum):
    """How a rewrite ended, never taken from a netlink syscall's return value (it is success for a failed batch)."""

    COMMITTED = "committed"
    CHECKED = "checked"
    EMPTY = "empty"
    FAILED = "failed"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class ProcessRun:
    """One run of one program, from exec (or the first time it was seen) to exit.

    Attributes:
        tgid: process id in the initial PID namespace.
        parent: the parent's tgid when last seen, 0 if unknown.
        started_ns: CLOCK_MONOTONIC nanoseconds of the exec.
        comm: the kernel's 15-character name; informative only, any process can choose it.
        executable: path of the executable as the exec or /proc gave it; empty if unknown.
        cgroup_id: the cgroup v2 id, 0 if unknown.
        host_namespaces: whether its PID or mount namespace is the host's.
    """

    tgid: int
    parent: int = 0
    started_ns: int = 0
    comm: str = ""
    executable: str = ""
    cgroup_id: int = 0
    host_namespaces: bool = False


@dataclass(frozen=True, slots=True)
class ObjectCount:
    """How many objects of one kind a batch adds or removes in one table."""

    family: str
    table: str
    object: str
    operation: str
    count: int


@dataclass(frozen=True, slots=True)
class Rewrite:
    """One transaction as the watched syscall and the batch's own bytes tell it.

    Attributes:
        dataplane, family, table: label values; `family` is `ipv4`, `ipv6` or `inet`, `table` is `~several` where a
            batch touches more than one.
        writer: the process class (`kube-proxy`, `other`, ...).
        run: the process whose syscall it was.
        begin_ns, end_ns: CLOCK_MONOTONIC at the syscall's entry and exit.
        size: bytes handed to the kernel.
        outcome: how it ended.
        truncated: whether the bounded copy of the batch was too short to know all objects.
        objects: what changed, as far as the copy tells.
        netns: inode of the writer's network namespace.
        generation: nf_tables generation after it, 0 if unknown.
    """

    dataplane: DataPlane
    family: str
    table: str
    writer: str
    run: ProcessRun
    begin_ns: int
    end_ns: int
    size: int
    outcome: Outcome
    truncated: bool = False
    objects: tuple[ObjectCount, ...] = ()
    netns: int = 0
    generation: int = 0
    details: Mapping[str, str] = field(default_factory=dict)
