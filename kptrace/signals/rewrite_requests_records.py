# SPDX-License-Identifier: Apache-2.0
"""What processes ask nfnetlink for by themselves: a mirror of bpf/include/kptrace/rewrite.h. Pure."""

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, NamedTuple

from kptrace.signals.rewrite_labels import FAMILIES

#: Kind of the ring's records that tell of requests.
KIND: Final = 5
#: `struct request_key`, `struct request_span`, `struct request_record`, and what the map of askers holds.
KEY: Final = struct.Struct("=4I")
SPAN: Final = struct.Struct("=3Q")
RECORD: Final = struct.Struct("=2I16s24s")
FIRST: Final = struct.Struct("=Q")

_KIND: Final = struct.Struct("=I")
#: Those that a writer's run may be of.
_RUNS: Final = frozenset({"ipv4", "ipv6", "inet"})


class Subsystem(IntEnum):
    """Of whom it was asked."""

    CTNETLINK = 1
    NFTABLES = 10


class Asker(NamedTuple):
    """Which requests belong together.

    Attributes:
        tgid: the process, in the initial PID namespace.
        netns: inode of its socket's network namespace.
        subsystem: rules (NFTABLES) or connections (CTNETLINK).
        family: that the requests name: `ipv4`, `ipv6` or `inet`; empty if it is none of these, or all.
    """

    tgid: int
    netns: int
    subsystem: Subsystem
    family: str


@dataclass(frozen=True, slots=True)
class Requests:
    """Dumps, or deletions of connections, with hardly anything between them; times in ns of CLOCK_MONOTONIC.

    Attributes:
        asker: whose and what.
        begin_ns: entry of the first request's system call.
        end_ns: entry of the last receive that brought an answer, or of the last request where receives are not seen. The
            kernel answers before it is read, so that this last receive only copies.
    """

    asker: Asker
    begin_ns: int
    end_ns: int


def is_requests(data: bytes) -> bool:
    """Whether a record of the ring tells of requests."""
    return len(data) >= _KIND.size and _KIND.unpack_from(data)[0] == KIND


def decode(data: bytes) -> Requests | None:
    """One record; None if it is of no known kind or cut, which would be a bug of the kernel side."""
    if not is_requests(data) or len(data) < RECORD.size:
        return None
    _, _, key, span = RECORD.unpack_from(data)
    return decode_span(key, span)


def decode_span(key: bytes, span: bytes) -> Requests | None:
    """An entry of the map of spans; None as `decode` has it."""
    asker = decode_key(key)
    if asker is None:
        return None
    begin, end, _ = SPAN.unpack(span)
    return Requests(asker, begin, end)


def decode_key(key: bytes) -> Asker | None:
    """Whose and what; None as `decode` has it."""
    tgid, netns, what, _ = KEY.unpack(key)
    if what >> 8 not in (Subsystem.CTNETLINK, Subsystem.NFTABLES):
        return None
    family = FAMILIES.get(what & 0xFF, "")
    return Asker(tgid, netns, Subsystem(what >> 8), family if family in _RUNS else "")
