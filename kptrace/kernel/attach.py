# SPDX-License-Identifier: Apache-2.0
"""Attaching loaded programs. Every attachment is a descriptor: closing it, or dying, detaches."""

import ctypes
import errno
import fcntl
import os
import struct

from kptrace.kernel.load import AttachType
from kptrace.kernel.syscall import Command, bpf, syscall
from kptrace.kernel.tracefs import Tracefs
from kptrace.model.errors import KernelError

_PERF_TYPE_TRACEPOINT = 2
_PERF_EVENT_IOC_SET_BPF = 0x40042408
_PERF_EVENT_IOC_ENABLE = 0x2400
_PERF_FLAG_FD_CLOEXEC = 8


class PriorityTaken(KernelError):
    """A hook holds this priority already: a chain, or another tracer."""


def attach_netfilter(program: int, nfproto: int, hook: int, priority: int) -> int:
    """Link a netfilter program in the calling thread's network namespace and return the link.

    Raises:
        PriorityTaken: something sits at that priority.
        KernelError: anything else that the kernel refused.
    """
    attr = struct.pack("<IIIIIIiI", program, 0, AttachType.NETFILTER, 0, nfproto, hook, priority, 0) + bytes(
        32
    )
    try:
        return bpf(Command.LINK_CREATE, attr)
    except KernelError as error:
        if error.errno in (errno.EBUSY, errno.EEXIST):
            raise PriorityTaken(str(error), errno=error.errno) from error
        raise


def attach_raw_tracepoint(program: int, name: str) -> int:
    """Attach a raw tracepoint program by the tracepoint's name and return the attachment."""
    text = ctypes.create_string_buffer(name.encode())
    return bpf(Command.RAW_TRACEPOINT_OPEN, struct.pack("<QIIQ", ctypes.addressof(text), program, 0, 0))


def attach_tracepoint(program: int, tracefs: Tracefs, group: str, name: str) -> int:
    """Attach a tracepoint program through a perf event and return the event.

    One event on one CPU is enough: the kernel keeps the program with the tracepoint, not with the CPU.
    """
    event = syscall(
        "perf_event_open",
        ctypes.create_string_buffer(
            struct.pack("<IIQQQQQ", _PERF_TYPE_TRACEPOINT, 128, tracefs.event_id(group, name), 1, 0, 0, 0)
            + bytes(80)
        ),
        ctypes.c_int(-1),
        ctypes.c_int(0),
        ctypes.c_int(-1),
        ctypes.c_ulong(_PERF_FLAG_FD_CLOEXEC),
    )
    try:
        fcntl.ioctl(event, _PERF_EVENT_IOC_SET_BPF, program)
        fcntl.ioctl(event, _PERF_EVENT_IOC_ENABLE, 0)
    except OSError as error:
        os.close(event)
        raise KernelError(
            f"cannot attach to {group}:{name}: {error.strerror}", errno=error.errno or 0
        ) from error
    return event
