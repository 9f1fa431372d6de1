# SPDX-License-Identifier: Apache-2.0
"""The BTF blob as flat tables: one pass over the types, everything else is left undecoded.

Layout (include/uapi/linux/btf.h): a header, a section of types (three words each and a tail that depends on the kind)
and a section of NUL-terminated strings that the types point into by offset.
"""

import struct
from array import array
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from kptrace.model.errors import KernelError

MAGIC: Final = 0xEB9F
VERSION: Final = 1
# magic, version, flags, hdr_len, type_off, type_len, str_off, str_len, in the byte order of this machine.
_HEADER: Final = struct.Struct("=HBBIIIII")


class BtfError(KernelError):
    """BTF that cannot be read, or that cannot answer the question."""


class BtfMissing(BtfError, LookupError):
    """The BTF has nothing of that name.

    Attributes:
        name: what was asked for.
    """

    def __init__(self, name: str, what: str = "type") -> None:
        super().__init__(
            f"the kernel's BTF has no {what} {name}", remedy="use another mechanism, or a newer kernel"
        )
        self.name = name


class Kind(IntEnum):
    """`BTF_KIND_*`."""

    VOID = 0
    INT = 1
    PTR = 2
    ARRAY = 3
    STRUCT = 4
    UNION = 5
    ENUM = 6
    FWD = 7
    TYPEDEF = 8
    VOLATILE = 9
    CONST = 10
    RESTRICT = 11
    FUNC = 12
    FUNC_PROTO = 13
    VAR = 14
    DATASEC = 15
    FLOAT = 16
    DECL_TAG = 17
    TYPE_TAG = 18
    ENUM64 = 19


# Words after the three common ones: fixed, and per element of vlen.
_FIXED_TAIL: Final = {Kind.INT: 1, Kind.ARRAY: 3, Kind.VAR: 1, Kind.DECL_TAG: 1}
_ELEMENT: Final = {
    Kind.STRUCT: 3, Kind.UNION: 3, Kind.ENUM: 2, Kind.FUNC_PROTO: 2, Kind.DATASEC: 3, Kind.ENUM64: 3
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class BtfType:
    """The common part of a type.

    Attributes:
        id: its number in this BTF.
        kind: what it is.
        name: empty for an anonymous type.
        vlen: number of members, enumerators or parameters.
        flag: kind_flag: bitfields in a structure, signed enumerators, a FWD of a union.
        value: size in bytes or the id of the type that it refers to, by kind.
    """

    id: int
    kind: Kind
    name: str
    vlen: int
    flag: bool
    value: int


@dataclass(frozen=True, slots=True)
class Member:
    """A member of a structure or union.

    Attributes:
        name: empty for an anonymous structure or union.
        type_id: its type.
        bit_offset: from the start of the structure that was asked.
        bits: width of a bitfield, 0 for an ordinary member.
    """

    name: str
    type_id: int
    bit_offset: int
    bits: int


@dataclass(frozen=True, slots=True)
class Tables:
    """One blob's sections.

    Attributes:
        words: the type section.
        starts: where in `words` each type begins, in the order of their ids; kinds and lengths have been checked.
        names: each type's name offset, which may lie in the base's strings.
        strings: the string section.
    """

    words: "array[int]"
    starts: "array[int]"
    names: "array[int]"
    strings: bytes


def decode(data: bytes) -> Tables:
    """Check the header and walk the types once.

    Raises:
        BtfError: the data is no BTF of this machine, is cut short or contradicts itself.
    """
    types, strings = _sections(data)
    words = array("I")
    words.frombytes(types)
    starts = _walk(words)
    return Tables(words, starts, array("I", map(words.__getitem__, starts)), strings)


def _sections(data: bytes) -> tuple[bytes, bytes]:
    if len(data) < _HEADER.size:
        raise BtfError(f"the BTF is cut short: {len(data)} bytes hold no header")
    magic, version, _, header, type_off, type_len, str_off, str_len = _HEADER.unpack_from(data)
    if magic != MAGIC or version != VERSION:
        raise BtfError(f"no BTF of this machine: magic {magic:#06x}, version {version}")
    if header < _HEADER.size or header + max(type_off + type_len, str_off + str_len) > len(data):
        raise BtfError(f"the BTF is cut short: its header promises more than its {len(data)} bytes")
    if type_off % 4 or type_len % 4:
        raise BtfError("corrupt BTF: the type section is not a row of whole words")
    strings = data[header + str_off : header + str_off + str_len]
    if strings and strings[-1]:
        raise BtfError("corrupt BTF: the last string has no end")
    return data[header + type_off : header + type_off + type_len], strings


def _walk(words: "array[int]") -> "array[int]":
    # 150,000 types in one Python loop: everything in it is a local and an index.
    fixed = [3 + _FIXED_TAIL.get(kind, 0) for kind in Kind]
    element = [_ELEMENT.get(kind, 0) for kind in Kind]
    starts = array("I")
    append = starts.append
    at, end = 0, len(words)
    kind = 0
    try:
        while at < end:
            info = words[at + 1]
            kind = (info >> 24) & 0x1F
            if not kind:
                raise BtfError(f"corrupt BTF: type {len(starts) + 1} of this blob has no kind")
            append(at)
            at += fixed[kind] + element[kind] * (info & 0xFFFF)
    except IndexError:
        if kind >= len(fixed):
            raise BtfError(f"type {len(starts)} of this blob has the unknown kind {kind}") from None
        raise BtfError("corrupt BTF: the last type is cut short") from None
    if at != end:
        raise BtfError("corrupt BTF: the last type is cut short")
    return starts
