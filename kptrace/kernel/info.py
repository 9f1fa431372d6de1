# SPDX-License-Identifier: Apache-2.0
"""What the kernel counts of a program or a link by itself, and the BTF objects that it has."""

import ctypes
import errno
import os
import struct
from typing import Final

from kptrace.kernel.object_ids import ObjectKind, describe, object_ids, open_object
from kptrace.kernel.objects import BTF_INFO
from kptrace.model.errors import KernelError

#: `recursion_misses` in `struct bpf_prog_info`: Linux kernel commit 9ed9e9ba2337 ("bpf: Count the number of times recursion
#: was prevented") (in v5.12).
_RECURSION_MISSES: Final = 208
#: `perf_event.type` and `perf_event.kprobe.missed` in `struct bpf_link_info`: Linux kernel commit 3acf8ace6823 ("bpf: Add
#: missed value to kprobe perf link info") (in v6.7).
_PERF_TYPE, _KPROBE_MISSED = 16, 48
_LINK_PERF_EVENT: Final = 7
_PERF_KPROBES: Final = (3, 4)  # BPF_PERF_EVENT_KPROBE, BPF_PERF_EVENT_KRETPROBE


def recursion_misses(program: int) -> int | None:
    """How often a program was not run since it, or another one, ran on that CPU already; None before v5.12."""
    info, size = describe(program)
    if size < _RECURSION_MISSES + 8:
        return None
    return int(struct.unpack_from("=Q", info, _RECURSION_MISSES)[0])


def kprobe_missed(link: int) -> int | None:
    """How often a linked kprobe was passed by (kretprobes: all instances were in use); None where that is not known."""
    try:
        info, size = describe(link)
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
    for identifier in object_ids(ObjectKind.BTF):
        fd = open_object(ObjectKind.BTF, identifier)
        if fd is None:
            continue
        try:
            if _btf_name(fd) == name:
                found, fd = fd, -1
                return found
        finally:
            if fd >= 0:
                os.close(fd)
    return None


def _btf_name(fd: int) -> str:
    """The module's name; empty for BTF that came from a program."""
    name = ctypes.create_string_buffer(64)
    info, _ = describe(fd, BTF_INFO.pack(0, 0, 0, ctypes.addressof(name), len(name), 0))
    return name.value.decode(errors="replace") if BTF_INFO.unpack_from(info)[5] else ""
