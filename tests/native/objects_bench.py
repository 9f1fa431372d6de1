# SPDX-License-Identifier: Apache-2.0
"""BPF objects for tests of what kptrace sees of other people's: made by bpf(2), listed by bpftool."""

import ctypes
import json
import os
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from kptrace.kernel.btf_write import load_btf, program_btf
from kptrace.kernel.foreign_map import ForeignMap
from kptrace.kernel.load import AttachType, ProgramType, load_program
from kptrace.kernel.maps import Map, MapSpec, MapType
from kptrace.kernel.objects import map_info, open_map
from kptrace.kernel.syscall import bpf_inout

PER_CPU = (MapType.PERCPU_HASH, MapType.PERCPU_ARRAY, MapType.LRU_PERCPU_HASH)
#: Types of maps whose values are plain bytes.
READABLE = (MapType.HASH, MapType.ARRAY, MapType.LRU_HASH, MapType.LPM_TRIE, *PER_CPU)
_BPF_F_NO_PREALLOC = 1
_PROG_TEST_RUN = 10
_MOV64_K, _MOV64_X, _CALL, _EXIT, _LD_IMM64 = 0xB7, 0xBF, 0x85, 0x95, 0x18
_TAIL_CALL = 12
_PSEUDO_MAP_FD = 1
_TEST_RUN = struct.Struct(
    "=IIIIQQII"
)  # prog_fd, retval, data sizes in and out, data in and out, repeat, duration


def _instruction(op: int, registers: int, immediate: int) -> bytes:
    return struct.pack("<BBhi", op, registers, 0, immediate)


def returning(code: int) -> bytes:
    """Instructions of a program that only returns a code."""
    return _instruction(_MOV64_K, 0, code) + _instruction(_EXIT, 0, 0)


def _map_address(register: int, map_fd: int) -> bytes:
    return _instruction(_LD_IMM64, _PSEUDO_MAP_FD << 4 | register, map_fd) + bytes(8)


def using(code: int, *map_fds: int) -> bytes:
    """Instructions of a program that names maps, and returns a code."""
    return b"".join(_map_address(1, each) for each in map_fds) + returning(code)


def tail_calling(map_fd: int, index: int, otherwise: int) -> bytes:
    """Instructions of a program that tail-calls, and returns a code where nothing is there."""
    return (
        _map_address(2, map_fd)
        + _instruction(_MOV64_K, 3, index)
        + _instruction(_CALL, 0, _TAIL_CALL)
        + returning(otherwise)
    )


def load(
    name: str,
    kind: ProgramType = ProgramType.SCHED_CLS,
    attach_type: AttachType = AttachType.NONE,
    code: bytes = returning(0),
) -> int:
    """A program with BTF of its own, as a compiled one has."""
    types = program_btf(name, kind)
    btf = load_btf(types.blob)
    try:
        return load_program(name, code, kind, attach_type, btf_fd=btf, function_info=types.function_info)
    finally:
        os.close(btf)  # the program holds it


def run(program: int, times: int) -> int:
    """Have the kernel run a program on a packet of zeros; its last return code."""
    packet = ctypes.create_string_buffer(64)
    attr = bytearray(
        _TEST_RUN.pack(program, 0, len(packet), 0, ctypes.addressof(packet), 0, times, 0) + bytes(40)
    )
    bpf_inout(_PROG_TEST_RUN, attr)
    return int(_TEST_RUN.unpack_from(attr)[1])


def bpftool(*arguments: object) -> Any:
    """What bpftool tells, parsed."""
    command = ["bpftool", "-j", *map(str, arguments)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


class Filled(NamedTuple):
    """A map as a stranger sees it, what was written to it, and the map as its owner has it."""

    foreign: ForeignMap
    written: dict[bytes, bytes]
    owner: Map


def entries(kind: MapType, number: int, cpus: int) -> dict[bytes, bytes]:
    """Entries for a map of `filled_map`: every key, and what a reader must see under it."""
    written = {}
    for n in range(number):
        # A key of a trie begins with the length of its prefix in bits.
        key = struct.pack("=II", 32, n) if kind is MapType.LPM_TRIE else struct.pack("=I", n)
        # 12 bytes: what the kernel rounds up to 16 for each CPU.
        values = [struct.pack("=III", n, cpu, n ^ 0x5A5A) for cpu in range(cpus if kind in PER_CPU else 1)]
        written[key] = b"".join(each + bytes(4) for each in values) if kind in PER_CPU else values[0]
    return written


@contextmanager
def filled_map(kind: MapType, number: int, cpus: int) -> Iterator[Filled]:
    """A map with that many entries, as its owner and as a stranger have it."""
    written = entries(kind, number, cpus)
    flags = _BPF_F_NO_PREALLOC if kind is MapType.LPM_TRIE else 0
    # An LRU map may throw out entries before it is full: each CPU keeps free ones to itself.
    room = number if kind in (MapType.ARRAY, MapType.PERCPU_ARRAY) else 4 * number
    spec = MapSpec("kpt_objects_map", kind, len(next(iter(written))), 12, room, flags)
    owner = Map(spec)
    try:
        for key, value in written.items():
            owner.update(key, value)
        fd = open_map(map_info(owner.fd).id)
        assert fd is not None
        foreign = ForeignMap(fd, map_info(fd), cpus)
        try:
            yield Filled(foreign, written, owner)
        finally:
            foreign.close()
    finally:
        owner.close()


@contextmanager
def closing(*descriptors: int) -> Iterator[None]:
    """Close the descriptors at the end."""
    try:
        yield
    finally:
        for each in descriptors:
            os.close(each)
