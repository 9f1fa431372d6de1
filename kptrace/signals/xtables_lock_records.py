# SPDX-License-Identifier: Apache-2.0
"""One process and the xtables lock, as the kernel side tells it: a mirror of bpf/include/kptrace/xtables_lock.h. Pure."""

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

STATE: Final = struct.Struct("=4I2Q6I2Q")
#: `struct attempt_key`.
ATTEMPT: Final = struct.Struct("=Q2I")

#: A failed attempt that is repeated within this time is the same wait: REPEAT_NS in xtables_lock.bpf.c.
REPEAT_NS: Final = 3_000_000_000


class Kind(IntEnum):
    """What a state tells of: a wait, which ended with the lock if it is a record, or a hold."""

    WAITING = 0
    TAKEN = 1
    HOLD = 2


_KINDS: Final = frozenset(int(kind) for kind in Kind)


@dataclass(frozen=True, slots=True)
class LockState:
    """A wait or a hold, under way or ended.

    Attributes:
        kind: see `Kind`.
        tgid, tid: process and thread that called flock(2).
        netns: inode of its network namespace.
        file: number of the open file, which owns the lock.
        device, inode: the lock file.
        parents: tgids of parent, grandparent and so on; 0 where there is none.
        begin_ns: CLOCK_MONOTONIC of a wait's first attempt, or of the return of the flock(2) that took the lock.
        end_ns: end of the wait, the hold, or the last attempt; 0 while it is under way.
    """

    kind: Kind
    tgid: int
    tid: int
    netns: int
    file: int
    device: int
    inode: int
    parents: tuple[int, ...]
    begin_ns: int
    end_ns: int


def decode(data: bytes) -> LockState | None:
    """One state; None if it is of no known kind or cut, which would be a bug of the kernel side."""
    if len(data) < STATE.size:
        return None
    kind, tgid, tid, netns, file, inode, device, *parents, _, begin, end = STATE.unpack_from(data)
    if kind not in _KINDS:
        return None
    return LockState(
        kind=Kind(kind),
        tgid=tgid,
        tid=tid,
        netns=netns,
        file=file,
        device=device,
        inode=inode,
        parents=tuple(parent for parent in parents if parent),
        begin_ns=begin,
        end_ns=end,
    )
