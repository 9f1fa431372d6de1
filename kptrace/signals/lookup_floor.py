# SPDX-License-Identifier: Apache-2.0
"""The floor: what a bracket around nothing reads on this machine, measured and never subtracted."""

import fcntl
import os
import socket
import struct
import threading
from array import array

from kptrace.kernel import syscall
from kptrace.kernel.histogram import SLOTS
from kptrace.model.errors import KernelError
from kptrace.model.netfilter import Hook, IpFamily
from kptrace.signals.lookup_cells import CELL_BYTES, CELLS_PER_BRACKET, MAX_BRACKETS, SUM_WORD, WORDS
from kptrace.signals.lookup_kernel import NO_BRACKET, BoundaryProgram, LookupKernel

#: The bracket number that the measurement uses; no chain ever gets it.
FLOOR_BRACKET = MAX_BRACKETS - 1
_PACKETS = 509


def measure_floor(kernel: LookupKernel) -> float:
    """Seconds that a bracket around no chain reads in the mean.

    A thread of its own enters a new network namespace, encloses nothing at LOCAL_OUT in a bracket, and sends packets
    to its own loopback address. The programs must be armed; with thin sampling the mean is of fewer packets.

    Raises:
        KernelError: a namespace or a link was refused, or no packet was sampled.
    """
    failure: list[BaseException] = []

    def run() -> None:
        try:
            syscall.unshare()
            links = [
                kernel.link_boundary(
                    BoundaryProgram(NO_BRACKET, FLOOR_BRACKET, 0, IpFamily.IPV4, 0), Hook.OUTPUT, -2
                ),
                kernel.link_boundary(
                    BoundaryProgram(FLOOR_BRACKET, NO_BRACKET, 0, IpFamily.IPV4, 0), Hook.OUTPUT, -1
                ),
            ]
            try:
                _send(_PACKETS)
            finally:
                for each in links:
                    os.close(each)
        except BaseException as error:  # noqa: BLE001  (raised again by the caller)
            failure.append(error)

    thread = threading.Thread(target=run, name="kptrace-floor")
    thread.start()
    thread.join()
    if failure:
        raise KernelError(f"the floor cannot be measured: {failure[0]}") from failure[0]
    base = FLOOR_BRACKET * CELLS_PER_BRACKET * CELL_BYTES
    words = array("Q", bytes(kernel.memory("cells")[base : base + CELLS_PER_BRACKET * CELL_BYTES]))
    count = sum(sum(words[cell * WORDS : cell * WORDS + SLOTS]) for cell in range(CELLS_PER_BRACKET))
    total = sum(words[cell * WORDS + SUM_WORD] for cell in range(CELLS_PER_BRACKET))
    if not count:
        raise KernelError("the floor cannot be measured: no packet was sampled")
    return total / count / 1e9


def _send(packets: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        # The new namespace's loopback is down: its address cannot be routed to until it is up.
        _loopback_up(sender)
        sender.bind(("127.0.0.1", 0))
        sender.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        for _ in range(packets):
            sender.sendto(b"k", sender.getsockname())


def _loopback_up(any_socket: socket.socket) -> None:
    siocsifflags, iff_up = 0x8914, 1
    fcntl.ioctl(any_socket, siocsifflags, struct.pack("16sH14x", b"lo", iff_up))
