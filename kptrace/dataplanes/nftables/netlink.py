# SPDX-License-Identifier: Apache-2.0
"""A minimal nfnetlink codec: offsets into the bytes, where pyroute2 builds objects of every message. Pure."""

import errno
import struct
from collections.abc import Iterator
from enum import IntEnum
from typing import Final

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

_ATTRIBUTE: Final = struct.Struct("=HH")
_TYPE_MASK = 0x3FFF  # without NLA_F_NESTED and NLA_F_NET_BYTEORDER
_HEADER_START = struct.Struct("=IHHI")


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
