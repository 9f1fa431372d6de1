# SPDX-License-Identifier: Apache-2.0
"""Builds netlink messages as nf_tables and its writers do."""

import struct


def attribute(kind: int, payload: bytes) -> bytes:
    """One attribute with its padding."""
    length = 4 + len(payload)
    return struct.pack("=HH", length, kind) + payload + bytes(-length % 4)


def name(kind: int, value: str) -> bytes:
    """An attribute that is a NUL-terminated string."""
    return attribute(kind, value.encode() + b"\0")


def number(kind: int, value: int) -> bytes:
    """An attribute that is a 32-bit number in network byte order."""
    return attribute(kind, struct.pack("!I", value & 0xFFFFFFFF))


def message(kind: int, *attributes: bytes, family: int = 2, flags: int = 0, sequence: int = 1) -> bytes:
    """A message with a `struct nfgenmsg`."""
    body = struct.pack("!BBH", family, 0, 0) + b"".join(attributes)
    return struct.pack("=IHHII", 16 + len(body), kind, flags, sequence, 0) + body


def nft(operation: int, *attributes: bytes, family: int = 2, flags: int = 0, sequence: int = 1) -> bytes:
    """A message of nf_tables."""
    return message(10 << 8 | operation, *attributes, family=family, flags=flags, sequence=sequence)


def done(sequence: int = 1, code: int = 0, flags: int = 0, kind: int = 3) -> bytes:
    """The end of a dump, or with kind 2 an error."""
    return struct.pack("=IHHIIi", 20, kind, flags, sequence, 0, code)


def chain(
    table: str,
    chain_name: str,
    hook: int | None = None,
    priority: int = 0,
    kind: str = "filter",
    *,
    family: int = 2,
    nested: int = 0,
) -> bytes:
    """A chain as a GETCHAIN dump has it; `nested` is or-ed to the hook attribute's type."""
    parts = [name(1, table), name(3, chain_name), attribute(2, bytes(8))]
    if hook is not None:
        parts += [attribute(4 | nested, number(1, hook) + number(2, priority)), number(5, 1), name(7, kind)]
    return nft(3, *parts, number(6, 0), family=family)


def batch(*messages: bytes, end: bool = True) -> bytes:
    """A batch around messages."""
    return message(0x10, family=0) + b"".join(messages) + (message(0x11, family=0) if end else b"")
