# SPDX-License-Identifier: Apache-2.0
"""Beginnings and ends of programs as plain data: a mirror of bpf/include/kptrace/process.h. Pure."""

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

ARGUMENT_BYTES: Final = 128
EXEC: Final = struct.Struct("=2I2Q4I4I16s128s")
EXIT: Final = struct.Struct("=2IQ2I")
_KIND: Final = struct.Struct("=I")


class Kind(IntEnum):
    """What a record tells of."""

    EXEC = 1
    EXIT = 2


@dataclass(frozen=True, slots=True)
class Exec:
    """A process began to run a program.

    Attributes:
        tgid, cgroup_id, comm: as in `kptrace.model.rewrite.ProcessRun`.
        at_ns: CLOCK_MONOTONIC.
        netns, mntns: inodes of its namespaces.
        filename: path of the executable as it was asked for.
        parents: tgids of parent, grandparent and so on; 0 where there is none.
        arguments: argv of a tool that reads or writes rules, as far as the bounded copy goes: the last one may be cut.
            None of any other program, and where they could not be read.
    """

    tgid: int
    at_ns: int
    cgroup_id: int
    parents: tuple[int, ...]
    netns: int
    mntns: int
    comm: str
    filename: str
    arguments: tuple[str, ...] | None = None

    @property
    def parent(self) -> int:
        """The parent's tgid, 0 if there is none."""
        return self.parents[0] if self.parents else 0


@dataclass(frozen=True, slots=True)
class Exit:
    """A process ended; `status` is as wait(2) has it."""

    tgid: int
    at_ns: int
    status: int


def decode(data: bytes) -> Exec | Exit | None:
    """One record; None if it is of no known kind or cut, which would be a bug of the kernel side."""
    kind = _KIND.unpack_from(data)[0] if len(data) >= _KIND.size else 0
    if kind == Kind.EXIT and len(data) >= EXIT.size:
        return Exit(*EXIT.unpack_from(data)[1:4])
    if kind == Kind.EXEC and len(data) >= EXEC.size:
        _, tgid, at, cgroup, *parents, netns, mntns, copied, _, comm, name = EXEC.unpack_from(data)
        return Exec(
            tgid=tgid,
            at_ns=at,
            cgroup_id=cgroup,
            parents=tuple(parent for parent in parents if parent),
            netns=netns,
            mntns=mntns,
            comm=_text(comm),
            filename=_text(name),
            arguments=_arguments(data[EXEC.size : EXEC.size + copied]) if copied else None,
        )
    return None


def _text(raw: bytes) -> str:
    return raw.split(b"\0", 1)[0].decode(errors="backslashreplace")


def _arguments(raw: bytes) -> tuple[str, ...]:
    return tuple(each.decode(errors="backslashreplace") for each in raw.removesuffix(b"\0").split(b"\0"))
