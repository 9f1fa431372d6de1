# SPDX-License-Identifier: Apache-2.0
"""Exactly N UDP datagrams as fast as they go, from one process for each CPU.

`python -m kptrace.experiments.flood IP PORT COUNT CPU` is one such process: one flow, sent by sendmmsg.
"""

import ctypes
import os
import socket
import sys
import time
from dataclasses import dataclass

from kptrace.experiments import command
from kptrace.experiments.netns import Namespace
from kptrace.experiments.traffic import spread
from kptrace.model.identity import ServiceAddress

_BATCH = 256
_PAYLOAD = b"kptrace"


@dataclass(frozen=True, slots=True)
class Flood:
    """What was sent.

    Attributes:
        datagrams: those that the kernel took from the sending processes: all that were asked for.
        flows: one for each process.
        seconds: from the first process's start to the last one's end.
    """

    datagrams: int
    flows: int
    seconds: float


class _Iovec(ctypes.Structure):
    """`struct iovec`."""

    _fields_ = (("base", ctypes.c_char_p), ("length", ctypes.c_size_t))


class _Msghdr(ctypes.Structure):
    """`struct msghdr`."""

    _fields_ = (
        ("name", ctypes.c_void_p),
        ("namelen", ctypes.c_uint32),
        ("iov", ctypes.POINTER(_Iovec)),
        ("iovlen", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("controllen", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


class _Mmsghdr(ctypes.Structure):
    """`struct mmsghdr`."""

    _fields_ = (("header", _Msghdr), ("length", ctypes.c_uint))


def send(ip: str, port: int, count: int) -> None:
    """Send exactly `count` datagrams of one flow from the calling process.

    Raises:
        OSError: the kernel refused one.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    iovec = _Iovec(_PAYLOAD, len(_PAYLOAD))
    messages = (_Mmsghdr * _BATCH)()
    for message in messages:
        message.header.iov = ctypes.pointer(iovec)
        message.header.iovlen = 1
    with socket.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.connect((ip, port))
        left = count
        while left:
            done = libc.sendmmsg(client.fileno(), messages, min(left, _BATCH), 0)
            if done < 0:
                code = ctypes.get_errno()
                raise OSError(code, os.strerror(code))
            left -= done


def flood(namespace: Namespace, target: ServiceAddress, count: int, *, cpus: int | None = None) -> Flood:
    """Send exactly `count` datagrams to an address from processes on the first `cpus` of the allowed CPUs.

    Each process is one flow from a port of its own. From the node itself every one meets its OUTPUT; from the client
    the receiving side's backlog may drop some before the node's PREROUTING: compare with a counter there.

    Raises:
        UnsupportedError: a process failed.
    """
    allowed = sorted(os.sched_getaffinity(0))
    used = allowed[: cpus or len(allowed)]
    begin = time.monotonic()
    processes = [
        namespace.popen(
            [
                sys.executable,
                "-m",
                "kptrace.experiments.flood",
                target.ip,
                str(target.port),
                str(part),
                str(cpu),
            ]
        )
        for part, cpu in zip(spread(count, len(used)), used, strict=True)
    ]
    for process in processes:
        command.finish(process)
    return Flood(count, len(processes), time.monotonic() - begin)


if __name__ == "__main__":
    os.sched_setaffinity(0, {int(sys.argv[4])})
    send(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
