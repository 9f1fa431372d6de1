# SPDX-License-Identifier: Apache-2.0
"""The phases of one rewrite as the kernel side tells them: a mirror of bpf/include/kptrace/rewrite_phases.h. Pure."""

import struct
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Final

PHASES: Final = struct.Struct("=4I7Q2I")
#: Bytes of a batch that follow.
HEAD_BYTES: Final = 256


class Kind(IntEnum):
    """Which function's run it is."""

    BATCH = 1
    REPLACE = 2
    DESTROY = 3
    TEARDOWN = 4


class Flag(IntFlag):
    """What ran inside: a commit that succeeded, an abort, a table that was replaced; or the kernel refused a table."""

    COMMITTED = 1
    ABORTED = 2
    REPLACED = 4
    REFUSED = 8


@dataclass(frozen=True, slots=True)
class Phases:
    """One function's run.

    Attributes:
        kind, flags: see `Kind` and `Flag`.
        tgid: the process; the worker's for a destroy.
        portid: of the sender's netlink socket.
        begin_ns, end_ns: CLOCK_MONOTONIC.
        mark_ns: when a legacy table's replacement itself began.
        inner_ns: time in the commit, or in the replacement itself.
        abort_ns: time in aborts.
        size: bytes of a batch.
        head: its first bytes.
    """

    kind: Kind
    flags: Flag
    tgid: int
    portid: int
    begin_ns: int
    end_ns: int
    mark_ns: int
    inner_ns: int
    abort_ns: int
    size: int
    head: bytes

    @property
    def total_ns(self) -> int:
        """The whole run."""
        return self.end_ns - self.begin_ns


_KINDS: Final = frozenset(int(kind) for kind in Kind)


def decode(data: bytes) -> Phases | None:
    """One record; None if it is of no known kind or cut, which would be a bug of the kernel side."""
    if len(data) < PHASES.size:
        return None
    kind, flags, tgid, portid, begin, end, mark, inner, abort, _, _, size, _ = PHASES.unpack_from(data)
    if kind not in _KINDS:
        return None
    head = data[PHASES.size : PHASES.size + min(size, HEAD_BYTES)] if kind == Kind.BATCH else b""
    return Phases(Kind(kind), Flag(flags), tgid, portid, begin, end, mark, inner, abort, size, head)
