# SPDX-License-Identifier: Apache-2.0
"""Small nfnetlink batches, sent by every system call that a writer may use."""

import ctypes
import mmap
import os
import socket
import struct
from collections.abc import Callable

NETLINK_NETFILTER = 12
NEWTABLE, DELCHAIN, DESTROYCHAIN = 10 << 8, 10 << 8 | 5, 10 << 8 | 27
NLM_F_REQUEST, NLM_F_ACK, NLM_F_CREATE = 1, 4, 0x400
IPV4 = 2
_LIBC = ctypes.CDLL(None, use_errno=True)
_IO_URING_SETUP, _IO_URING_ENTER, _IORING_OP_SENDMSG = 425, 426, 9


def message(kind: int, flags: int, family: int, resource: int, payload: bytes = b"") -> bytes:
    """One nfnetlink message."""
    body = struct.pack("!BBH", family, 0, resource) + payload
    return struct.pack("=IHHII", 16 + len(body), kind, flags, 1, 0) + body


def name(kind: int, text: str) -> bytes:
    """A string attribute, padded."""
    raw = text.encode() + b"\0"
    return struct.pack("=HH", 4 + len(raw), kind) + raw + bytes(-len(raw) % 4)


def new_table(table: str, *, flags: int = NLM_F_CREATE) -> bytes:
    """Add a table."""
    return message(NEWTABLE, NLM_F_REQUEST | flags, IPV4, 0, name(1, table))


def delete_chain(table: str, chain: str, *, flags: int = 0) -> bytes:
    """Delete a chain."""
    return message(DELCHAIN, NLM_F_REQUEST | flags, IPV4, 0, name(1, table) + name(3, chain))


def destroy_chain(table: str, chain: str) -> bytes:
    """Delete a chain if it is there (Linux kernel commit f80a612dd77c in v6.3); nft of the same age is not needed."""
    return message(DESTROYCHAIN, NLM_F_REQUEST, IPV4, 0, name(1, table) + name(3, chain))


def batch(*messages: bytes, end: bool = True) -> bytes:
    """The messages between BATCH_BEGIN and BATCH_END; without the end it is a check."""
    tail = message(0x11, NLM_F_REQUEST, 0, 10) if end else b""
    return message(0x10, NLM_F_REQUEST, 0, 10) + b"".join(messages) + tail


def open_socket() -> socket.socket:
    """A connected NETLINK_NETFILTER socket in the calling thread's namespace."""
    channel = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)
    channel.bind((0, 0))
    channel.connect((0, 0))
    return channel


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_char_p), ("length", ctypes.c_size_t))


class _Message(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_length", ctypes.c_uint),
        ("vectors", ctypes.POINTER(_Iovec)),
        ("count", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_int),
        ("sent", ctypes.c_uint),
    )


def _raw_message(data: bytes) -> _Message:
    return _Message(vectors=ctypes.pointer(_Iovec(data, len(data))), count=1)


def _sendmmsg(channel: socket.socket, data: bytes) -> None:
    assert _LIBC.sendmmsg(channel.fileno(), ctypes.byref(_raw_message(data)), 1, 0) == 1


def _splice(channel: socket.socket, data: bytes) -> None:
    read, write = os.pipe()
    try:
        os.write(write, data)
        assert os.splice(read, channel.fileno(), len(data)) == len(data)
    finally:
        os.close(read)
        os.close(write)


def _io_uring(channel: socket.socket, data: bytes) -> None:
    parameters = bytearray(120)
    buffer = (ctypes.c_char * 120).from_buffer(parameters)
    ring = _LIBC.syscall(_IO_URING_SETUP, 4, buffer)
    assert ring >= 0, os.strerror(ctypes.get_errno())
    entries = struct.unpack_from("=I", parameters)[0]
    tail, array = struct.unpack_from("=4xI16xI", parameters, 40)
    pending = _raw_message(data)
    try:
        with (
            mmap.mmap(ring, array + entries * 4, offset=0) as submission,
            mmap.mmap(ring, entries * 64, offset=0x10000000) as requests,
        ):
            requests[:32] = struct.pack(
                "=BBHiQQII",
                _IORING_OP_SENDMSG,
                0,
                0,
                channel.fileno(),
                0,
                ctypes.addressof(pending),
                1,
                0,
            )
            submission[array : array + 4] = struct.pack("=I", 0)
            submission[tail : tail + 4] = struct.pack("=I", 1)
            assert _LIBC.syscall(_IO_URING_ENTER, ring, 1, 1, 1, None, 0) == 1
    finally:
        os.close(ring)


Sender = Callable[[socket.socket, bytes], object]

SEEN: dict[str, Sender] = {
    "sendmsg": lambda channel, data: channel.sendmsg([data]),
    "sendto": lambda channel, data: channel.sendto(data, (0, 0)),
    "send": lambda channel, data: channel.send(data),
    "write": lambda channel, data: os.write(channel.fileno(), data),
    "writev": lambda channel, data: os.writev(channel.fileno(), [data]),
    "sendmmsg": _sendmmsg,
    "empty_first_vector": lambda channel, data: channel.sendmsg([b"", data]),
    "header_in_pieces": lambda channel, data: channel.sendmsg([data[:4], data[4:7], data[7:]]),
}
UNSEEN: dict[str, Sender] = {"splice": _splice, "io_uring": _io_uring}


def answers(channel: socket.socket) -> list[int]:
    """The errnos that the kernel answered, 0 for acknowledgements."""
    found = []
    while True:
        try:
            data = channel.recv(65536, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return found
        at = 0
        while at + 20 <= len(data):
            length, kind = struct.unpack_from("=IH", data, at)
            if kind == 2:
                found.append(-struct.unpack_from("=i", data, at + 16)[0])
            at += (length + 3) & ~3
