# SPDX-License-Identifier: Apache-2.0
"""An inventory of the ruleset from netlink dumps, one datagram at a time: whoever runs it decides when to go on."""

import errno
import os
import socket
import struct
from collections.abc import Iterator
from typing import Final

from kptrace.dataplanes.nftables.netlink import (
    ATTRIBUTES,
    HEADER,
    NETLINK_NETFILTER,
    NLM_F_DUMP,
    NLM_F_DUMP_INTR,
    NLMSG_DONE,
    NLMSG_ERROR,
    DatagramSocket,
    NetlinkError,
    NftMessage,
    attributes,
    be32,
    messages,
    request,
)
from kptrace.dataplanes.nftables.object_changes import take_object
from kptrace.dataplanes.nftables.objects import Inventory

_RECEIVE_BYTES = 1 << 16
_TIMEOUT: Final = struct.pack("@ll", 5, 0)
_TABLE_NAME, _SET_NAME, _GENERATION = 1, 2, 1
_KINDS: Final = (NftMessage.GETTABLE, NftMessage.GETCHAIN, NftMessage.GETRULE, NftMessage.GETSET)


class Interrupted(NetlinkError):
    """The ruleset changed while it was read: begin again."""


def open_channel() -> socket.socket:
    """A socket for dumps in the calling thread's network namespace."""
    channel = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER)
    channel.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIMEOUT)
    channel.bind((0, 0))
    return channel


class RulesetDump:
    """One reading of the whole ruleset.

    Iterating does it, a datagram a step; `inventory` is complete, and of one generation, when the iteration ends.
    """

    def __init__(self, channel: DatagramSocket) -> None:
        """Read through a socket that nobody else uses."""
        self._channel = channel
        self._sequence = 0
        self.inventory = Inventory()

    def __iter__(self) -> Iterator[None]:
        """Read on by one datagram a step.

        Raises:
            Interrupted: the ruleset changed.
            NetlinkError: the kernel refused.
        """
        self.inventory.generation = self._generation()
        for kind in _KINDS:
            yield from self._dump(kind, 0, b"")
        for family, table, name in list(self.inventory.named_sets()):
            names = _string(_TABLE_NAME, table) + _string(_SET_NAME, name)
            yield from self._dump(NftMessage.GETSETELEM, family, names)
        if self._generation() != self.inventory.generation:
            raise Interrupted("a commit came in between", errno=errno.EINTR)

    def _dump(self, kind: NftMessage, family: int, attributes_: bytes) -> Iterator[None]:
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
                take_object(self.inventory, data[start:end])
            yield

    def _generation(self) -> int:
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


def _string(kind: int, value: str) -> bytes:
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
