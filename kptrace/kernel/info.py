# SPDX-License-Identifier: Apache-2.0
"""What the kernel counts of a program or a link by itself, and the BTF objects that it has."""

import ctypes
import errno
import os
import struct
from collections.abc import Iterator
from typing import Final

from kptrace.kernel.syscall import Command, bpf, bpf_inout
from kptrace.model.errors import KernelError

_BYTES: Final = (
    512  # more than any of the kernel's structures so far; it fills what it knows, and says how much
)
_GET_INFO: Final = struct.Struct("=IIQ")
#: `recursion_misses` in `struct bpf_prog_info`: Linux kernel commit 9ed9e9ba2337 ("bpf: Count the number of times recursion
#: was prevented") (in v5.12).
_RECURSION_MISSES: Final = 208
#: `perf_event.type` and `perf_event.kprobe.missed` in `struct bpf_link_info`: Linux kernel commit 3acf8ace6823 ("bpf: Add
#: missed value to kprobe perf link info") (in v6.7).
_PERF_TYPE, _KPROBE_MISSED = 16, 48
_LINK_PERF_EVENT: Final = 7
_PERF_KPROBES: Final = (3, 4)  # BPF_PERF_EVENT_KPROBE, BPF_PERF_EVENT_KRETPROBE
_NEXT_ID: Final = struct.Struct("=III")
#: `struct bpf_btf_info`: btf, btf_size, id, name, name_len, kernel_btf.
_BTF_INFO: Final = struct.Struct("=QIIQII")


def recursion_misses(program: int) -> int | None:
    """How often a program was not run since it, or another one, ran on that CPU already; None before v5.12."""
    info, size = _info(program)
    if size < _RECURSION_MISSES + 8:
        return None
    return int(struct.unpack_from("=Q", info, _RECURSION_MISSES)[0])


def kprobe_missed(link: int) -> int | None:
    """How often a linked kprobe was passed by (kretprobes: all instances were in use); None where that is not known."""
    try:
        info, size = _info(link)
    except KernelError as error:
        if error.errno in (errno.EINVAL, errno.EBADF):
            return None  # a perf event, which is no BPF object
        raise
    kind, perf_type = struct.unpack_from("=I", info)[0], struct.unpack_from("=I", info, _PERF_TYPE)[0]
    if size < _KPROBE_MISSED + 8 or kind != _LINK_PERF_EVENT or perf_type not in _PERF_KPROBES:
        return None
    return int(struct.unpack_from("=Q", info, _KPROBE_MISSED)[0])


def btf_object(name: str) -> int | None:
    """A descriptor of a kernel module's BTF object, to be closed; None if there is none of that name.

    Raises:
        KernelError: the caller may not list them (CAP_SYS_ADMIN).
    """
    for identifier in _btf_ids():
        try:
            fd = bpf(Command.BTF_GET_FD_BY_ID, _NEXT_ID.pack(identifier, 0, 0))
        except KernelError as error:
            if error.errno == errno.ENOENT:
                continue
            raise
        try:
            if _btf_name(fd) == name:
                found, fd = fd, -1
                return found
        finally:
            if fd >= 0:
                os.close(fd)
    return None


def _info(fd: int) -> tuple[bytes, int]:
    """What the kernel tells of an object, and how many bytes of that it knows."""
    info = ctypes.create_string_buffer(_BYTES)
    attr = bytearray(_GET_INFO.pack(fd, _BYTES, ctypes.addressof(info)))
    bpf_inout(Command.OBJ_GET_INFO_BY_FD, attr)
    return info.raw, int(_GET_INFO.unpack(attr)[1])


def _btf_ids() -> Iterator[int]:
    identifier = 0
    while True:
        attr = bytearray(_NEXT_ID.pack(identifier, 0, 0))
        try:
            bpf_inout(Command.BTF_GET_NEXT_ID, attr)
        except KernelError as error:
            if error.errno == errno.ENOENT:
                return
            raise
        identifier = int(_NEXT_ID.unpack(attr)[1])
        yield identifier


def _btf_name(fd: int) -> str:
    """The module's name; empty for BTF that came from a program."""
    name = ctypes.create_string_buffer(64)
    info = ctypes.create_string_buffer(
        _BTF_INFO.pack(0, 0, 0, ctypes.addressof(name), len(name), 0), _BTF_INFO.size
    )
    bpf(Command.OBJ_GET_INFO_BY_FD, _GET_INFO.pack(fd, len(info), ctypes.addressof(info)))
    return name.value.decode(errors="replace") if _BTF_INFO.unpack(info.raw)[5] else ""
