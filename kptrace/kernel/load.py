# SPDX-License-Identifier: Apache-2.0
"""Loading a linked program by bpf(2): nothing of BCC or LLVM is in this process."""

import ctypes
import errno
import os
import struct
from enum import IntEnum

from kptrace.kernel.syscall import Command, bpf
from kptrace.model.errors import KernelError, PrivilegeError

_LOG_BYTES = 1 << 18
_LICENCE = b"GPL"


class ProgramType(IntEnum):
    """`enum bpf_prog_type`, as far as kptrace uses it."""

    KPROBE = 2
    SCHED_CLS = 3
    TRACEPOINT = 5
    XDP = 6
    RAW_TRACEPOINT = 17
    CGROUP_SOCK_ADDR = 18
    TRACING = 26
    NETFILTER = 32


class AttachType(IntEnum):
    """`enum bpf_attach_type`, as far as kptrace uses it."""

    NONE = 0
    CGROUP_INET4_CONNECT = 10
    CGROUP_INET6_CONNECT = 11
    CGROUP_UDP4_SENDMSG = 14
    CGROUP_UDP6_SENDMSG = 15
    CGROUP_UDP4_RECVMSG = 19
    CGROUP_UDP6_RECVMSG = 20
    TRACE_FENTRY = 24
    TRACE_FEXIT = 25
    CGROUP_INET4_GETPEERNAME = 29
    CGROUP_INET6_GETPEERNAME = 30
    XDP = 37
    PERF_EVENT = 41
    NETFILTER = 45
    TCX_INGRESS = 46
    TCX_EGRESS = 47


def load_program(
    name: str,
    code: bytes,
    kind: ProgramType,
    attach_type: AttachType = AttachType.NONE,
    *,
    attach_btf_id: int = 0,
    attach_fd: int = 0,
    btf_fd: int = 0,
    function_info: bytes = b"",
    function_info_size: int = 8,
) -> int:
    """Load one program and return its descriptor, closed on exec.

    Args:
        name: for people.
        code: instructions.
        kind: what the kernel will run it for.
        attach_type: where, for the kinds that need it.
        attach_btf_id: the function that a tracing program is for.
        attach_fd: the BTF of that function's module (`btf_object`), or the BPF program that has it; 0 for the kernel's own.
        btf_fd: the program's own BTF (`btf_write.load_btf`); 0 for none.
        function_info: which of that BTF's functions the program consists of: `struct bpf_func_info` one after another.
        function_info_size: bytes of one of them.

    The verifier's log is asked for only when the kernel refused the program: writing it makes a load many times slower.

    Raises:
        PrivilegeError: CAP_BPF (or CAP_PERFMON, CAP_NET_ADMIN) is missing.
        KernelError: the verifier refused the program; the message has the last lines of its log.
    """
    instructions = ctypes.create_string_buffer(code, len(code))
    licence = ctypes.create_string_buffer(_LICENCE)
    functions = ctypes.create_string_buffer(function_info, len(function_info))

    def attempt(log: "ctypes.Array[ctypes.c_char] | None") -> int:
        attr = struct.pack(
            "<IIQQIIQII16sIIIIQIIQIIII",
            kind,
            len(code) // 8,
            ctypes.addressof(instructions),
            ctypes.addressof(licence),
            1 if log else 0,
            len(log) if log else 0,
            ctypes.addressof(log) if log else 0,
            0,
            0,
            name.encode()[:15],
            0,
            attach_type,
            btf_fd,
            function_info_size if function_info else 0,
            ctypes.addressof(functions) if function_info else 0,
            len(function_info) // function_info_size,
            0,
            0,
            0,
            attach_btf_id,
            attach_fd,
            0,
        )
        return bpf(Command.PROG_LOAD, attr)

    try:
        return attempt(None)
    except KernelError as first:
        if first.errno == errno.EPERM:
            raise PrivilegeError(
                f"the kernel refused to load the program {name}: {first}",
                remedy="run as root, or grant CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN",
            ) from first
        log = ctypes.create_string_buffer(_LOG_BYTES)
        try:
            return attempt(log)
        except KernelError as second:
            lines = log.value.decode(errors="replace").strip().splitlines()[-12:]
            raise KernelError(
                f"the kernel refused to load the program {name}: {second}: {' | '.join(lines)}",
                errno=second.errno,
            ) from second


def close_all(descriptors: list[int]) -> None:
    """Close descriptors and empty the list."""
    while descriptors:
        os.close(descriptors.pop())
