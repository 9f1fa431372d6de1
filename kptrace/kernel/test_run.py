# SPDX-License-Identifier: Apache-2.0
"""Having the kernel run a program on a packet that nobody sent."""

import ctypes
import struct
from typing import Final

from kptrace.kernel.syscall import Command, bpf_inout

#: prog_fd, retval, data_size_in, data_size_out, data_in, data_out, repeat, duration
_TEST_RUN: Final = struct.Struct("=IIIIQQII")
_PACKET_BYTES: Final = 64


def run_program(program: int, times: int) -> int:
    """Run a program for packets on a packet of zeros, one run after the other, and return its last return code.

    Linux kernel commit 1cf1cae963c2 ("bpf: introduce BPF_PROG_TEST_RUN command") (in v4.12).

    Raises:
        KernelError: the kernel cannot run programs of this kind, or may not for this process.
    """
    packet = ctypes.create_string_buffer(_PACKET_BYTES)
    attr = bytearray(
        _TEST_RUN.pack(program, 0, _PACKET_BYTES, 0, ctypes.addressof(packet), 0, times, 0) + bytes(40)
    )
    bpf_inout(Command.PROG_TEST_RUN, attr)
    return int(_TEST_RUN.unpack_from(attr)[1])
