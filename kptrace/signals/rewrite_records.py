# SPDX-License-Identifier: Apache-2.0
"""The ring buffer's records as plain data: a mirror of bpf/include/kptrace/rewrite.h. Pure."""

import struct
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Final

HEAD: Final = struct.Struct("=4I2QqQ7Ii4I16sI20s2I")
_KIND: Final = struct.Struct("=I")


class Kind(IntEnum):
    """What a record tells of."""

    FLAT = 1
    VECTOR = 2
    REPLACE4 = 3
    REPLACE6 = 4


class Flag(IntFlag):
    """What the kernel side noticed about a transaction.

    UNSURE: its first bytes could be read at the exit only. UNREAD: part of it could never be read. SEVERAL: one of
    several messages of a sendmmsg. TAIL: the last bytes are there. OVERLAP: another transaction ran at the same time,
    somewhere on the node.
    """

    UNSURE = 1
    UNREAD = 2
    SEVERAL = 4
    TAIL = 8
    OVERLAP = 16


@dataclass(frozen=True, slots=True)
class Transaction:
    """One syscall that carried a transaction.

    Attributes:
        kind: an nfnetlink batch (FLAT, VECTOR), or a legacy table's replacement.
        tgid, tid: process and thread, in the initial PID namespace.
        flags: see `Flag`.
        begin_ns, end_ns: CLOCK_MONOTONIC.
        result: of the syscall, negative for an errno.
        cgroup_id: of the thread.
        netns: inode of the socket's network namespace; `task_netns` is the thread's own.
        mntns: inode of the thread's mount namespace.
        sequence_begin, sequence_end: the ruleset's generation, or one bit of it, at entry and exit.
        answers: messages that the kernel queued on the sender's socket meanwhile.
        error: errno (negative) of the newest error among them, 0 if there is none.
        parents: tgids of parent, grandparent and so on; 0 where there is none.
        comm: the thread's name.
        size: bytes that were handed over.
        tail: the buffer's last 20 bytes, empty if unknown.
        data: its first bytes.
    """

    kind: Kind
    tgid: int
    tid: int
    flags: Flag
    begin_ns: int
    end_ns: int
    result: int
    cgroup_id: int
    netns: int
    task_netns: int
    mntns: int
    sequence_begin: int
    sequence_end: int
    answers: int
    error: int
    parents: tuple[int, ...]
    comm: str
    size: int
    tail: bytes
    data: bytes

    @property
    def is_batch(self) -> bool:
        """Whether it is one of nf_tables."""
        return self.kind in (Kind.FLAT, Kind.VECTOR)


def decode(data: bytes) -> Transaction | None:
    """One record; None if it is of no known kind or cut, which would be a bug of the kernel side."""
    kind = _KIND.unpack_from(data)[0] if len(data) >= _KIND.size else 0
    if Kind.FLAT <= kind <= Kind.REPLACE6 and len(data) >= HEAD.size:
        return _transaction(data)
    return None


def _transaction(data: bytes) -> Transaction | None:
    (
        kind, tgid, tid, flags, begin, end, result, cgroup, netns, task_netns, mntns,
        sequence_begin, sequence_end, queued_begin, queued_end, error,
        *parents, comm, size, tail, copied, _,
    ) = HEAD.unpack_from(data)  # fmt: skip
    copy = data[HEAD.size : HEAD.size + copied]
    if len(copy) < copied:
        return None
    # A vector's size is known from the syscall's result only.
    whole = size or (result if result > 0 else len(copy))
    return Transaction(
        kind=Kind(kind),
        tgid=tgid,
        tid=tid,
        flags=Flag(flags),
        begin_ns=begin,
        end_ns=end,
        result=result,
        cgroup_id=cgroup,
        netns=netns,
        task_netns=task_netns,
        mntns=mntns,
        sequence_begin=sequence_begin,
        sequence_end=sequence_end,
        answers=max(0, queued_end - queued_begin),
        error=error,
        parents=tuple(parent for parent in parents if parent),
        comm=_text(comm),
        size=max(whole, len(copy)),
        tail=tail if flags & Flag.TAIL else b"",
        data=copy,
    )


def _text(raw: bytes) -> str:
    return raw.split(b"\0", 1)[0].decode(errors="backslashreplace")
