# SPDX-License-Identifier: Apache-2.0
"""A minimal nfnetlink codec and socket: pyroute2 needs 22 us a message, too slow for dumps of 10,000 chains."""

import errno
import os
import socket
import struct
import sys
from collections.abc import Iterator
from enum import IntEnum
from typing import Final, Protocol, Self

from kptrace.model.errors import KernelError

NETLINK_NETFILTER: Final = 12
NFNL_SUBSYS_NFTABLES: Final = 10

NLMSG_ERROR: Final = 2
NLMSG_DONE: Final = 3
NLM_F_REQUEST: Final = 0x1
NLM_F_DUMP: Final = 0x300
NLM_F_DUMP_INTR: Final = 0x10

#: `struct nlmsghdr` (length, type, flags, sequence, port) and `struct nfgenmsg` (family, version, resource) after it.
HEADER: Final = struct.Struct("=IHHII")
_NFGENMSG: Final = struct.Struct("!BBH")
#: Where a message's attributes begin: behind both.
ATTRIBUTES: Final = HEADER.size + _NFGENMSG.size

_NFTA_GEN_ID = 1
_ATTRIBUTE: Final = struct.Struct("=HH")
_TYPE_MASK = 0x3FFF  # without NLA_F_NESTED and NLA_F_NET_BYTEORDER
_HEADER_START = struct.Struct("=IHHI")
_RECEIVE_BYTES = 1 << 16  # the kernel fills at most 32 KiB of a dump at once
_ATTEMPTS = 8
_TIMEVAL = struct.Struct("@ll")


class NetlinkError(KernelError):
    """The kernel answered an nfnetlink request with an error, or its answer cannot be understood."""


class NftMessage(IntEnum):
    """`enum nf_tables_msg_types`."""

    NEWTABLE = 0
    GETTABLE = 1
    DELTABLE = 2
    NEWCHAIN = 3
    GETCHAIN = 4
    DELCHAIN = 5
    NEWRULE = 6
    GETRULE = 7
    DELRULE = 8
    NEWSET = 9
    GETSET = 10
    DELSET = 11
    NEWSETELEM = 12
    GETSETELEM = 13
    DELSETELEM = 14
    NEWGEN = 15
    GETGEN = 16
    NEWOBJ = 18
    DELOBJ = 20
    NEWFLOWTABLE = 22
    DELFLOWTABLE = 24
    # The kernel's commit f80a612dd77c ("netfilter: nf_tables: add support to destroy operation") (in v6.3).
    DESTROYTABLE = 26
    DESTROYCHAIN = 27
    DESTROYRULE = 28
    DESTROYSET = 29
    DESTROYSETELEM = 30
    DESTROYOBJ = 31
    DESTROYFLOWTABLE = 32

    @property
    def wire(self) -> int:
        """The `nlmsg_type`: subsystem and operation."""
        return NFNL_SUBSYS_NFTABLES << 8 | self


def messages(buffer: bytes) -> Iterator[tuple[int, int, int, int, int]]:
    """The messages of a buffer as `(nlmsg_type, flags, sequence, start, end)`; `start` is the header's offset.

    Raises:
        NetlinkError: the buffer ends within a message, or a message claims to be shorter than its header. Messages
            before it were yielded.
    """
    unpack, offset, size = _HEADER_START.unpack_from, 0, len(buffer)
    while offset + HEADER.size <= size:
        length, kind, flags, sequence = unpack(buffer, offset)
        end = offset + length
        if length < HEADER.size or end > size:
            break
        yield kind, flags, sequence, offset, end
        offset += (length + 3) & ~3
    if offset < size:
        raise NetlinkError(f"a netlink message is cut at byte {offset} of {size}", errno=errno.EBADMSG)


def attributes(buffer: bytes, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """The attributes between two offsets as `(type, start, end)` of their payload, type without its flags.

    Stops at the first one that is cut or malformed.
    """
    unpack = _ATTRIBUTE.unpack_from
    while start + 4 <= end:
        length, kind = unpack(buffer, start)
        stop = start + length
        if length < 4 or stop > end:
            return
        yield kind & _TYPE_MASK, start + 4, stop
        start += (length + 3) & ~3


def text(buffer: bytes, start: int, end: int) -> str:
    """A NUL-terminated name; bytes that are no UTF-8 become escapes."""
    return buffer[start:end].split(b"\0", 1)[0].decode(errors="backslashreplace")


def be32(buffer: bytes, start: int, end: int) -> int:
    """An unsigned number in network byte order; 0 where the payload is too short."""
    return int.from_bytes(buffer[start : start + 4], "big") if end - start >= 4 else 0


def request(message: NftMessage, flags: int, sequence: int, family: int) -> bytes:
    """An nf_tables request without attributes."""
    return HEADER.pack(ATTRIBUTES, message.wire, flags | NLM_F_REQUEST, sequence, 0) + _NFGENMSG.pack(
        family, 0, 0
    )


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
