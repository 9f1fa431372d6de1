# SPDX-License-Identifier: Apache-2.0
"""bpf(2), perf_event_open(2) and setns(2) as plain calls that raise `KernelError` with the errno they saw."""

import ctypes
import errno
import os
import platform
from functools import cache

from kptrace.model.errors import KernelError, UnsupportedError

# System call numbers by machine: the C library has no wrapper for them.
_NUMBERS = {
    "x86_64": {"bpf": 321, "perf_event_open": 298, "fsopen": 430, "fsconfig": 431, "fsmount": 432},
    "aarch64": {"bpf": 280, "perf_event_open": 241, "fsopen": 430, "fsconfig": 431, "fsmount": 432},
}

CLONE_NEWNET = 0x40000000


class Command:
    """`enum bpf_cmd`, as far as kptrace uses it."""

    MAP_CREATE = 0
    MAP_LOOKUP_ELEM = 1
    MAP_UPDATE_ELEM = 2
    MAP_DELETE_ELEM = 3
    MAP_GET_NEXT_KEY = 4
    PROG_LOAD = 5
    OBJ_PIN = 6
    OBJ_GET = 7
    PROG_TEST_RUN = 10
    PROG_GET_NEXT_ID = 11
    MAP_GET_NEXT_ID = 12
    PROG_GET_FD_BY_ID = 13
    MAP_GET_FD_BY_ID = 14
    OBJ_GET_INFO_BY_FD = 15
    RAW_TRACEPOINT_OPEN = 17
    BTF_LOAD = 18
    BTF_GET_FD_BY_ID = 19
    BTF_GET_NEXT_ID = 23
    MAP_LOOKUP_BATCH = 24
    LINK_CREATE = 28
    LINK_UPDATE = 29
    LINK_GET_FD_BY_ID = 30
    LINK_GET_NEXT_ID = 31
    ENABLE_STATS = 32


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def syscall(name: str, *arguments: object) -> int:
    """Make the system call; raise `KernelError` with its errno where it fails.

    Raises:
        UnsupportedError: the machine's system call numbers are not known.
    """
    try:
        number = _NUMBERS[platform.machine()][name]
    except KeyError:
        raise UnsupportedError(
            f"no system call number for {name} on {platform.machine()}", remedy="run on x86_64 or aarch64"
        ) from None
    result = int(_libc().syscall(ctypes.c_long(number), *arguments))
    if result < 0:
        code = ctypes.get_errno()
        raise KernelError(f"{name}: {errno.errorcode.get(code, code)} ({os.strerror(code)})", errno=code)
    return result


def bpf(command: int, attr: bytes) -> int:
    """Make a BPF call with an input-only attribute; the result is a file descriptor or 0."""
    buffer = ctypes.create_string_buffer(attr, len(attr))
    return syscall("bpf", ctypes.c_int(command), buffer, ctypes.c_uint(len(attr)))


def bpf_inout(command: int, attr: bytearray) -> int:
    """Make a BPF call whose attribute the kernel also writes to; `attr` has the answer afterwards."""
    buffer = (ctypes.c_char * len(attr)).from_buffer(attr)
    return syscall("bpf", ctypes.c_int(command), buffer, ctypes.c_uint(len(attr)))


def setns(fd: int, kind: int = CLONE_NEWNET) -> None:
    """Move the calling thread into the namespace that `fd` refers to."""
    if _libc().setns(ctypes.c_int(fd), ctypes.c_int(kind)) < 0:
        code = ctypes.get_errno()
        raise KernelError(f"setns: {errno.errorcode.get(code, code)} ({os.strerror(code)})", errno=code)


def unshare(kind: int = CLONE_NEWNET) -> None:
    """Give the calling thread a new namespace of this kind."""
    if _libc().unshare(ctypes.c_int(kind)) < 0:
        code = ctypes.get_errno()
        raise KernelError(f"unshare: {errno.errorcode.get(code, code)} ({os.strerror(code)})", errno=code)
