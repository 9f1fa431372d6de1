# SPDX-License-Identifier: Apache-2.0
"""Requests to nf_tables through an nfnetlink socket, and their answers."""

import errno
import os
import socket
import struct
import sys
from typing import Protocol, Self

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

_NFTA_GEN_ID = 1
_RECEIVE_BYTES = 1 << 16  # the kernel fills at most 32 KiB of a dump at once
_ATTEMPTS = 8
_TIMEVAL = struct.Struct("@ll")


class DatagramSocket(Protocol):
    """What is needed of a socket."""

    def send(self, data: bytes, /) -> int:
        """Send one datagram."""
        ...

    def recv(self, size: int, /) -> bytes:
        """Receive one datagram."""
        ...

    def close(self) -> None:
        """Close."""
        ...


class NfnetlinkSocket:
    """Requests to nf_tables of one network namespace: the one that the socket was made in."""

    def __init__(self, channel: DatagramSocket) -> None:
        """Use a bound NETLINK_NETFILTER socket, which must time out rather than block for ever."""
        self._socket = channel
        self._sequence = 0

    @classmethod
    def open(cls, timeout: float = 5.0) -> Self:
        """Open one in the calling thread's network namespace; `timeout` is seconds for each datagram.

        Raises:
            NetlinkError: the kernel has no nfnetlink.
        """
        try:
            channel = socket.socket(
                socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER
            )
        except OSError as error:
            raise NetlinkError(
                f"no NETLINK_NETFILTER socket: {error.strerror}", errno=error.errno or 0
            ) from error
        # The kernel's own time limit spares the poll(2) before each recv(2) that settimeout() costs.
        limit = _TIMEVAL.pack(int(timeout), int(timeout % 1 * 1e6))
        channel.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        channel.bind((0, 0))
        return cls(channel)

    def dump(self, message: NftMessage, family: int = socket.AF_UNSPEC) -> list[bytes]:
        """All objects of a kind as one message each, header included, from one consistent dump.

        It is repeated a bounded number of times while others' commits interrupt it.

        Raises:
            NetlinkError: the kernel refused, or the ruleset never stayed the same for as long as a dump takes.
        """
        for _ in range(_ATTEMPTS):
            objects = self._attempt(message, family)
            if objects is not None:
                return objects
        raise NetlinkError(
            f"{message.name} was interrupted {_ATTEMPTS} times by other commits", errno=errno.EINTR
        )

    def _attempt(self, message: NftMessage, family: int) -> list[bytes] | None:
        """The messages of one dump; None if it was interrupted."""
        self._send(message, NLM_F_DUMP, family)
        objects: list[bytes] = []
        intact = True
        while True:
            datagram = self._receive()
            if datagram is None:  # datagrams were lost: read on to the end, then start again
                intact = False
                continue
            for kind, flags, sequence, start, end in messages(datagram):
                if sequence != self._sequence:
                    break  # the rest of a dump that was given up
                if flags & NLM_F_DUMP_INTR:
                    intact = False
                if kind > NLMSG_DONE:
                    objects.append(datagram[start:end])
                elif kind in (NLMSG_DONE, NLMSG_ERROR):
                    if code := _error(datagram, start, end):
                        raise _refused(message, code)
                    return objects if intact else None

    def generation(self) -> int:
        """The ruleset's generation: it moves with every commit in the namespace.

        The answer's process id and name are the asker's, not the last writer's; so they are not returned.
        """
        self._send(NftMessage.GETGEN, 0, socket.AF_UNSPEC)
        while True:
            datagram = self._receive() or b""
            for kind, _, sequence, start, end in messages(datagram):
                if sequence != self._sequence:
                    break  # the rest of a dump that was given up
                if kind == NLMSG_ERROR:
                    raise _refused(NftMessage.GETGEN, _error(datagram, start, end))
                for name, low, high in attributes(datagram, start + ATTRIBUTES, end):
                    if name == _NFTA_GEN_ID:
                        return be32(datagram, low, high)

    def _send(self, message: NftMessage, flags: int, family: int) -> None:
        self._sequence = self._sequence % 0xFFFFFFFF + 1
        try:
            self._socket.send(request(message, flags, self._sequence, family))
        except OSError as error:
            raise _refused(message, error.errno or 0) from error

    def _receive(self) -> bytes | None:
        try:
            return self._socket.recv(_RECEIVE_BYTES)
        except OSError as error:
            if error.errno == errno.ENOBUFS:
                return None
            raise NetlinkError(
                f"no answer from nf_tables: {error.strerror}", errno=error.errno or 0
            ) from error

    def close(self) -> None:
        """Close the socket. Idempotent."""
        self._socket.close()


def _error(datagram: bytes, start: int, end: int) -> int:
    """The errno of an NLMSG_ERROR or NLMSG_DONE message, 0 if there is none."""
    payload = datagram[start + HEADER.size : min(end, start + HEADER.size + 4)]
    return max(0, -int.from_bytes(payload, sys.byteorder, signed=True))


def _refused(message: NftMessage, code: int) -> NetlinkError:
    return NetlinkError(
        f"{message.name}: {errno.errorcode.get(code, code)} ({os.strerror(code)})", errno=code
    )
