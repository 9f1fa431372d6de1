# SPDX-License-Identifier: Apache-2.0
"""Netlink dumps of nf_tables, one datagram at a time: whoever runs one decides when to go on."""

import errno
import os
import socket
import struct
from collections.abc import Callable, Iterator
from typing import Final

from kptrace.dataplanes.nftables.netlink import (
    ATTRIBUTES,
    HEADER,
    NETLINK_NETFILTER,
    NLM_F_DUMP,
    NLM_F_DUMP_INTR,
    NLMSG_DONE,
    NLMSG_ERROR,
    NetlinkError,
    NftMessage,
    attributes,
    be32,
    messages,
    request,
)
from kptrace.dataplanes.nftables.netlink_socket import DatagramSocket

_RECEIVE_BYTES = 1 << 16
_TIMEOUT: Final = struct.pack("@ll", 5, 0)
_GENERATION = 1


class Interrupted(NetlinkError):
    """The ruleset changed while it was read: begin again."""


def open_channel() -> socket.socket:
    """A socket for dumps in the calling thread's network namespace."""
    channel = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER)
    channel.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIMEOUT)
    channel.bind((0, 0))
    return channel


class DumpChannel:
    """Dumps through a socket that nobody else uses."""

    def __init__(self, channel: DatagramSocket) -> None:
        """Nothing is asked yet."""
        self._channel = channel
        self._sequence = 0

    def dump(
        self, kind: NftMessage, family: int, attributes_: bytes, take: Callable[[bytes], None]
    ) -> Iterator[None]:
        """Hand every object of a kind to `take`, header included; a datagram a step.

        Raises:
            Interrupted: the ruleset changed, or what was asked for is gone.
            NetlinkError: the kernel refused.
        """
        self._send(kind, NLM_F_DUMP, family, attributes_)
        while True:
            data = self._receive()
            for message, flags, sequence, start, end in messages(data):
                if sequence != self._sequence:
                    continue  # of a dump that was given up
                if flags & NLM_F_DUMP_INTR:
                    raise Interrupted("a commit interrupted the dump", errno=errno.EINTR)
                if message in (NLMSG_DONE, NLMSG_ERROR):
                    _check(kind, data, start, end)
                    return
                take(data[start:end])
            yield

    def generation(self) -> int:
        """The ruleset's generation: it moves with every commit."""
        self._send(NftMessage.GETGEN, 0, 0, b"")
        while True:
            data = self._receive()
            for message, _, sequence, start, end in messages(data):
                if sequence != self._sequence:
                    continue
                if message == NLMSG_ERROR:
                    _check(NftMessage.GETGEN, data, start, end)
                for name, low, high in attributes(data, start + ATTRIBUTES, end):
                    if name == _GENERATION:
                        return be32(data, low, high)

    def _send(self, kind: NftMessage, flags: int, family: int, attributes_: bytes) -> None:
        self._sequence += 1
        message = request(kind, flags, self._sequence, family) + attributes_
        self._channel.send(struct.pack("=I", len(message)) + message[4:])

    def _receive(self) -> bytes:
        try:
            return self._channel.recv(_RECEIVE_BYTES)
        except OSError as error:
            raise NetlinkError(
                f"no answer from nf_tables: {error.strerror}", errno=error.errno or 0
            ) from error


def string(kind: int, value: str) -> bytes:
    """A string attribute."""
    raw = value.encode() + b"\0"
    return struct.pack("=HH", 4 + len(raw), kind) + raw + bytes(-len(raw) % 4)


def _check(kind: NftMessage, data: bytes, start: int, end: int) -> None:
    code = -struct.unpack_from("=i", data, start + HEADER.size)[0] if end - start >= HEADER.size + 4 else 0
    if code == errno.ENOENT:
        raise Interrupted(f"{kind.name}: what was asked for is gone", errno=code)
    if code > 0:
        raise NetlinkError(
            f"{kind.name}: {errno.errorcode.get(code, code)} ({os.strerror(code)})", errno=code
        )
