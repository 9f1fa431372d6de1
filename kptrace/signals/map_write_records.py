# SPDX-License-Identifier: Apache-2.0
"""Writes to other programs' maps as plain data: the ring's records mirror bpf/include/kptrace/map_write.h. Pure."""

import errno
import struct
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Final

HEAD: Final = struct.Struct("=2I2Qq10I16s")
#: Bytes of keys and values that one record carries at most.
ENTRY_BYTES: Final = 4096
_MAP, _PROGRAM = 1, 2


class Flag(IntFlag):
    """What the kernel side noticed about a call.

    UNSURE: its attributes could be read at the exit only. UNREAD: its entries could never be read. BATCH: a call for
    many entries. VALUES: values follow the keys.
    """

    UNSURE = 1
    UNREAD = 2
    BATCH = 4
    VALUES = 8


class Command(IntEnum):
    """`enum bpf_cmd`, as far as it changes maps and programs."""

    UPDATE = 2
    DELETE = 3
    PROGRAM_LOAD = 5
    PROGRAM_ATTACH = 8
    PROGRAM_DETACH = 9
    LOOKUP_AND_DELETE = 21
    LOOKUP_AND_DELETE_BATCH = 25
    UPDATE_BATCH = 26
    DELETE_BATCH = 27
    LINK_CREATE = 28
    LINK_UPDATE = 29
    LINK_DETACH = 34

    @property
    def adds(self) -> bool:
        """Whether it writes entries; the other commands on maps remove them."""
        return self in (Command.UPDATE, Command.UPDATE_BATCH)


_WRITES: Final = frozenset(
    {
        Command.UPDATE,
        Command.DELETE,
        Command.LOOKUP_AND_DELETE,
        Command.LOOKUP_AND_DELETE_BATCH,
        Command.UPDATE_BATCH,
        Command.DELETE_BATCH,
    }
)
_KNOWN: Final = frozenset(int(command) for command in Command)


@dataclass(frozen=True, slots=True)
class WatchedMap:
    """A map of another program whose writes are to be told.

    Attributes:
        number: what `MapWrite.map` will say: the caller's own, the same for all maps that mean the same.
        name: for labels, one of few (`lb4_services_v2`).
        family: `ipv4`, `ipv6`, or `inet` where it holds both or neither.
        type: `enum bpf_map_type`; writes to a map that has this id but not this type and these sizes are not told.
        key_size, value_size: bytes, as the kernel tells them (`BPF_OBJ_GET_INFO_BY_FD`).
    """

    number: int
    name: str
    family: str
    type: int
    key_size: int
    value_size: int


@dataclass(frozen=True, slots=True)
class MapWrite:
    """One call that wrote to a watched map, or failed to.

    Attributes:
        begin_ns, end_ns: CLOCK_MONOTONIC at the call's entry and exit.
        tgid, tid: process and thread, in the initial PID namespace.
        command: which call.
        map: number of the map, as user space gave it (`WatchedMap.number`).
        map_id: the kernel's id of the map.
        result: of the call, negative for an errno.
        asked: entries that the call was for; of a removal of whatever is there, at most so many.
        count: entries that the kernel wrote or removed, a failed batch's first ones included.
        size: bytes of keys and values that were handed over.
        entries: key and value (empty in removals) of those that were done, as far as they were copied; of a single call
            that failed the one it was for.
        truncated: whether fewer entries are here than were done.
    """

    begin_ns: int
    end_ns: int
    tgid: int
    tid: int
    command: Command
    map: int
    map_id: int
    result: int
    asked: int
    count: int
    size: int
    entries: tuple[tuple[bytes, bytes], ...]
    truncated: bool

    @property
    def absent(self) -> bool:
        """Whether it removed nothing, or not all, for what is no failure: an entry was not there."""
        return self.result == -errno.ENOENT and not self.command.adds

    @property
    def failed(self) -> bool:
        """Whether the kernel refused it, or the rest of it."""
        return self.result < 0 and not self.absent


@dataclass(frozen=True, slots=True)
class Replacement:
    """One call by which a watched process loaded, attached or replaced a program.

    Attributes:
        begin_ns, end_ns: CLOCK_MONOTONIC at the call's entry and exit.
        tgid, tid: process and thread, in the initial PID namespace.
        command: which call; UPDATE is a tail call's new target.
        result: of the call, negative for an errno.
        name: of the program, or of the map of tail calls, 15 bytes at most; empty where the call does not say.
        object_id: the kernel's id of the program, or of that map; 0 where the call does not say.
    """

    begin_ns: int
    end_ns: int
    tgid: int
    tid: int
    command: Command
    result: int
    name: str
    object_id: int

    @property
    def failed(self) -> bool:
        """Whether the kernel refused it."""
        return self.result < 0


def decode(data: bytes) -> MapWrite | Replacement | None:
    """One record; None if it is of no known kind or cut, which would be a bug of the kernel side."""
    if len(data) < HEAD.size:
        return None
    (
        kind, command, begin, end, result, tgid, tid, flags, number, object_id,
        asked, done, copied, key_size, value_bytes, name,
    ) = HEAD.unpack_from(data)  # fmt: skip
    if command not in _KNOWN:
        return None
    call = Command(command)
    if kind == _PROGRAM:
        text = name.split(b"\0", 1)[0].decode(errors="backslashreplace")
        return Replacement(begin, end, tgid, tid, call, result, text, object_id)
    if kind != _MAP or call not in _WRITES or len(data) < HEAD.size + copied * (key_size + value_bytes):
        return None
    count = _done(result, asked, done) if flags & Flag.BATCH else int(result >= 0)
    entries = _entries(data, copied, key_size, value_bytes)
    if flags & Flag.BATCH:
        entries = entries[:count]
    return MapWrite(
        begin_ns=begin,
        end_ns=end,
        tgid=tgid,
        tid=tid,
        command=call,
        map=number,
        map_id=object_id,
        result=result,
        asked=asked,
        count=count,
        size=(count if call is Command.LOOKUP_AND_DELETE_BATCH else asked) * (key_size + value_bytes),
        entries=entries,
        truncated=len(entries) < count,
    )


def _done(result: int, asked: int, done: int) -> int:
    """Entries of a batch that were done.

    A call that fails before its first entry leaves the count as it was asked for on older kernels: not all can be done
    where some failed. But a removal of whatever is there ends with ENOENT, however many that was.
    """
    if result < 0 and result != -errno.ENOENT and done >= asked:
        return 0
    return min(done, asked)


def _entries(data: bytes, count: int, key_size: int, value_bytes: int) -> tuple[tuple[bytes, bytes], ...]:
    values = HEAD.size + count * key_size
    return tuple(
        (
            data[HEAD.size + each * key_size : HEAD.size + (each + 1) * key_size],
            data[values + each * value_bytes : values + (each + 1) * value_bytes],
        )
        for each in range(count)
    )
