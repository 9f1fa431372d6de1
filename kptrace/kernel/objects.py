# SPDX-License-Identifier: Apache-2.0
"""Programs, maps, links and BTF of any owner: found by id or by pin, and described."""

import ctypes
import errno
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kptrace.kernel.load import AttachType
from kptrace.kernel.object_ids import ObjectKind, describe, object_ids, open_object
from kptrace.kernel.syscall import Command, bpf
from kptrace.model.errors import KernelError

#: `struct bpf_btf_info`: btf, btf_size, id, name, name_len, kernel_btf.
BTF_INFO: Final = struct.Struct("=QIIQII")
_OBJECT: Final = struct.Struct("=QII")  # pathname, bpf_fd, file_flags
_ID: Final = struct.Struct("=I")
_FUNCTION_INFO: Final = struct.Struct("=II")  # struct bpf_func_info: insn_off, type_id
#: `struct bpf_prog_info`: type, id, tag; load_time; nr_map_ids; name; btf_id; nr_func_info; run_time_ns, run_cnt,
#: recursion_misses. What an older kernel does not know stays 0.
_PROGRAM: Final = struct.Struct("=II8s24xQ4xI8x16s48xI12xI44xQQQ")
#: Where in it begin nr_map_ids and map_ids, then func_info_rec_size, func_info and nr_func_info, and where those end.
_MAP_IDS, _FUNCTIONS, _PROGRAM_ASKED = 52, 132, 148
#: `struct bpf_map_info`: type, id, key_size, value_size, max_entries, map_flags, name; btf_id, btf_key_type_id,
#: btf_value_type_id.
_MAP: Final = struct.Struct("=IIIIII16s24xIII")
#: `struct bpf_link_info`: type, id, prog_id; then by kind: cgroup_id and attach_type, or ifindex and attach_type.
_LINK: Final = struct.Struct("=III")
_LINK_KIND: Final = 16
_LINK_CGROUP, _LINK_DEVICE = struct.Struct("=QI"), struct.Struct("=II")
_MANY: Final = 64  # of maps or functions: what a program of any size has; for more the kernel is asked twice


@dataclass(frozen=True, slots=True)
class ProgramInfo:
    """A loaded program.

    Attributes:
        id: never used again.
        type: `enum bpf_prog_type`.
        name: its first 15 bytes; the whole one is that of function 0 in its BTF.
        tag: hash of its instructions, in hex.
        btf_id: of its BTF object; 0 if it has none.
        functions: type ids of its functions in that BTF, its entry first; empty if it has no BTF, or may not be looked at.
        map_ids: the maps that it uses.
        run_time_ns: spent in it while run statistics were on, since it was loaded; 0 before v5.1.
        run_count: runs in that time.
        recursion_misses: how often it was not run since it, or another one, ran on that CPU already; 0 before v5.12.
        loaded_ns: when, in CLOCK_BOOTTIME.
    """

    id: int
    type: int
    name: str
    tag: str
    btf_id: int
    functions: tuple[int, ...]
    map_ids: tuple[int, ...]
    run_time_ns: int
    run_count: int
    recursion_misses: int
    loaded_ns: int


@dataclass(frozen=True, slots=True)
class MapInfo:
    """A map.

    Attributes:
        id: never used again.
        type: `enum bpf_map_type`.
        key_size: bytes of a key.
        value_size: bytes of a value, of one CPU's in a per-CPU map.
        max_entries: how many there is room for.
        flags: `BPF_F_*` that it was made with.
        name: its first 15 bytes.
        btf_id: of its BTF object; 0 if it has none.
        btf_key_type: type of the keys in that BTF; 0 if that does not tell.
        btf_value_type: type of the values, likewise.
    """

    id: int
    type: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int
    name: str
    btf_id: int
    btf_key_type: int
    btf_value_type: int


@dataclass(frozen=True, slots=True)
class LinkInfo:
    """What holds a program to its hook.

    Attributes:
        id: never used again.
        type: `enum bpf_link_type`.
        program: id of the program.
        attach_type: `enum bpf_attach_type`; 0 where the kind of link does not tell.
        ifindex: of the device for XDP, tcx and netkit links; 0 for others, and when the device is gone.
        cgroup: id of the cgroup (its inode) for cgroup links; 0 for others.
    """

    id: int
    type: int
    program: int
    attach_type: int
    ifindex: int
    cgroup: int


class LinkType:
    """`enum bpf_link_type`, as far as kptrace looks into it."""

    TRACING = 2
    CGROUP = 3
    XDP = 6
    TCX = 11
    NETKIT = 13


def program_ids() -> Iterator[int]:
    """Ids of all programs; see `object_ids`."""
    return object_ids(ObjectKind.PROGRAM)


def map_ids() -> Iterator[int]:
    """Ids of all maps; see `object_ids`."""
    return object_ids(ObjectKind.MAP)


def link_ids() -> Iterator[int]:
    """Ids of all links; see `object_ids`."""
    return object_ids(ObjectKind.LINK)


def open_program(identifier: int) -> int | None:
    """A descriptor of the program, to be closed; None if it is gone."""
    return open_object(ObjectKind.PROGRAM, identifier)


def open_map(identifier: int) -> int | None:
    """A descriptor of the map, to be closed; None if it is gone."""
    return open_object(ObjectKind.MAP, identifier)


def open_link(identifier: int) -> int | None:
    """A descriptor of the link, to be closed; None if it is gone."""
    return open_object(ObjectKind.LINK, identifier)


def open_pin(path: Path) -> int:
    """A descriptor of the object that is pinned at this path of a BPF file system, to be closed.

    Raises:
        KernelError: there is none (ENOENT), the path is in no BPF file system (EPERM or EACCES), or may not be opened.
    """
    return _pin(Command.OBJ_GET, 0, path)


def set_pin(fd: int, path: Path) -> None:
    """Pin the object at this path of a BPF file system: it stays until the file is removed."""
    _pin(Command.OBJ_PIN, fd, path)


def program_info(fd: int) -> ProgramInfo:
    """What the kernel tells of a program; see `ProgramInfo`."""
    room = _MANY
    while True:
        maps = ctypes.create_string_buffer(_ID.size * room)
        functions = ctypes.create_string_buffer(_FUNCTION_INFO.size * room)
        request = bytearray(_PROGRAM_ASKED)
        struct.pack_into("=IQ", request, _MAP_IDS, room, ctypes.addressof(maps))
        struct.pack_into("=IQI", request, _FUNCTIONS, _FUNCTION_INFO.size, ctypes.addressof(functions), room)
        info, _ = describe(fd, bytes(request))
        (
            kind,
            identifier,
            tag,
            loaded,
            map_count,
            name,
            btf_id,
            function_count,
            run_time,
            run_count,
            misses,
        ) = _PROGRAM.unpack_from(info)
        if max(map_count, function_count) <= room:
            break
        room = max(map_count, function_count)
    return ProgramInfo(
        identifier,
        kind,
        _text(name),
        tag.hex(),
        btf_id,
        tuple(type_id for _, type_id in _FUNCTION_INFO.iter_unpack(functions.raw))[:function_count],
        tuple(each for (each,) in _ID.iter_unpack(maps.raw))[:map_count],
        run_time,
        run_count,
        misses,
        loaded,
    )


def map_info(fd: int) -> MapInfo:
    """What the kernel tells of a map; see `MapInfo`."""
    kind, identifier, key, value, entries, flags, name, *btf = _MAP.unpack_from(describe(fd)[0])
    return MapInfo(identifier, kind, key, value, entries, flags, _text(name), *btf)


def link_info(fd: int) -> LinkInfo:
    """What the kernel tells of a link; see `LinkInfo`."""
    info, _ = describe(fd)
    kind, identifier, program = _LINK.unpack_from(info)
    attach_type = ifindex = cgroup = 0
    if kind == LinkType.CGROUP:
        cgroup, attach_type = _LINK_CGROUP.unpack_from(info, _LINK_KIND)
    elif kind == LinkType.XDP:
        ifindex, attach_type = struct.unpack_from("=I", info, _LINK_KIND)[0], AttachType.XDP
    elif kind in (LinkType.TCX, LinkType.NETKIT):
        ifindex, attach_type = _LINK_DEVICE.unpack_from(info, _LINK_KIND)
    elif kind == LinkType.TRACING:
        attach_type = struct.unpack_from("=I", info, _LINK_KIND)[0]
    return LinkInfo(identifier, kind, program, attach_type, ifindex, cgroup)


def btf_bytes(btf_id: int) -> bytes:
    """The raw BTF of an object, for `Btf.parse`.

    Raises:
        KernelError: there is none of that id any more (ENOENT), or the caller may not open it (CAP_SYS_ADMIN).
    """
    fd = open_object(ObjectKind.BTF, btf_id)
    if fd is None:
        raise KernelError(f"there is no BTF object {btf_id} any more", errno=errno.ENOENT)
    try:
        size = BTF_INFO.unpack_from(describe(fd)[0])[1]
        blob = ctypes.create_string_buffer(size)
        describe(fd, BTF_INFO.pack(ctypes.addressof(blob), size, 0, 0, 0, 0))
    finally:
        os.close(fd)
    return blob.raw


def _pin(command: int, fd: int, path: Path) -> int:
    text = ctypes.create_string_buffer(os.fsencode(path))
    return bpf(command, _OBJECT.pack(ctypes.addressof(text), fd, 0))


def _text(name: bytes) -> str:
    return name.split(b"\0", 1)[0].decode(errors="replace")
