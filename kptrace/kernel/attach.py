# SPDX-License-Identifier: Apache-2.0
"""Attaching loaded programs. Every attachment is a descriptor: closing it, or dying, detaches."""

import ctypes
import errno
import fcntl
import os
import struct

from kptrace.kernel.host import Host
from kptrace.kernel.load import AttachType
from kptrace.kernel.syscall import Command, bpf, syscall
from kptrace.kernel.tracefs import Tracefs
from kptrace.model.errors import KernelError, UnsupportedError

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
        _set_program(event, program, f"{group}:{name}")
    except KernelError:
        os.close(event)
        raise
    return event


def attach_tracing(program: int) -> int:
    """Attach a loaded fentry or fexit program to the function that it was loaded for and return the link."""
    return bpf(Command.RAW_TRACEPOINT_OPEN, struct.pack("<QIIQ", 0, program, 0, 0))


def kprobe_pmu(host: Host) -> int:
    """The perf event type of kprobes.

    Raises:
        UnsupportedError: the kernel has no kprobes, or sysfs does not tell.
    """
    path = host.sys / "bus/event_source/devices/kprobe/type"
    try:
        return int(path.read_text())
    except (OSError, ValueError) as error:
        raise UnsupportedError(
            f"no kprobes through perf events: {path}: {error}",
            remedy="use a kernel with CONFIG_KPROBE_EVENTS",
        ) from error


def open_kprobe(pmu: int, function: str, *, at_return: bool = False) -> int:
    """A kprobe at the entry or the return of a function as a perf event: it goes away with its descriptor.

    perf_event_open(2), never tracefs, whose kprobes outlive their maker.
    """
    name = ctypes.create_string_buffer(function.encode())
    # struct perf_event_attr: type, size, config (bit 0: at the return), period, two formats, flags, wakeup and bp_type,
    # kprobe_func, probe_offset.
    attr = struct.pack(
        "<IIQQQQQIIQQ", pmu, 128, int(at_return), 0, 0, 0, 0, 0, 0, ctypes.addressof(name), 0
    ) + bytes(56)
    return syscall(
        "perf_event_open",
        ctypes.create_string_buffer(attr, len(attr)),
        ctypes.c_int(-1),
        ctypes.c_int(0),
        ctypes.c_int(-1),
        ctypes.c_ulong(_PERF_FLAG_FD_CLOEXEC),
    )


def attach_kprobe(program: int, pmu: int, function: str, *, at_return: bool = False) -> int:
    """Attach a kprobe program and return a BPF link, or the perf event where the kernel has no such links.

    Linux kernel commit b89fbfbb854c ("bpf: Implement minimal BPF perf link") (in v5.15). A link can tell what it missed.
    """
    event = open_kprobe(pmu, function, at_return=at_return)
    try:
        link = bpf(
            Command.LINK_CREATE,
            struct.pack("<IIIIQ", program, event, AttachType.PERF_EVENT, 0, 0) + bytes(32),
        )
    except KernelError as error:
        try:
            if error.errno != errno.EINVAL:
                raise
            _set_program(event, program, function)
        except KernelError:
            os.close(event)
            raise
        return event
    os.close(event)  # the link holds it
    return link


def _set_program(event: int, program: int, name: str) -> None:
    try:
        fcntl.ioctl(event, _PERF_EVENT_IOC_SET_BPF, program)
        fcntl.ioctl(event, _PERF_EVENT_IOC_ENABLE, 0)
    except OSError as error:
        raise KernelError(f"cannot attach to {name}: {error.strerror}", errno=error.errno or 0) from error
