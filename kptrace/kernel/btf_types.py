# SPDX-License-Identifier: Apache-2.0
"""Types of one BTF blob by their id: what they are, what they consist of, how large they are."""

from typing import Final

from kptrace.kernel.btf_format import BtfError, BtfType, Kind, Member
from kptrace.kernel.btf_index import Index

AGGREGATES: Final = (Kind.STRUCT, Kind.UNION)
_POINTER_BYTES: Final = 8
# The kernel's own verifier resolves no deeper (MAX_RESOLVE_DEPTH).
_MAX_DEPTH: Final = 32
_MODIFIERS: Final = frozenset({Kind.TYPEDEF, Kind.VOLATILE, Kind.CONST, Kind.RESTRICT, Kind.TYPE_TAG})
_SIZED: Final = frozenset(
    {Kind.INT, Kind.STRUCT, Kind.UNION, Kind.ENUM, Kind.ENUM64, Kind.FLOAT, Kind.DATASEC}
)


class Types:
    """The types of one blob and of its base."""

    def __init__(self, index: Index) -> None:
        self._index: Final = index

    @property
    def end_id(self) -> int:
        """One more than the highest type id."""
        return self._index.end_id

    def type(self, type_id: int) -> BtfType:
        """The common part of a type; 0 is void.

        Raises:
            BtfError: no type has this id.
        """
        if type_id == 0:
            return BtfType(0, Kind.VOID, "", 0, False, 0)
        words, at = self._index.locate(type_id)
        name, info, value = words[at : at + 3]
        return BtfType(
            type_id,
            Kind((info >> 24) & 0x1F),
            self._index.string(name),
            info & 0xFFFF,
            bool(info >> 31),
            value,
        )

    def members(self, type_id: int) -> list[Member]:
        """The members of a structure or union in their order; none for any other type."""
        header = self.type(type_id)
        if header.kind not in AGGREGATES:
            return []
        words, at = self._index.locate(type_id)
        found = []
        for index in range(at + 3, at + 3 + 3 * header.vlen, 3):
            name, member_type, offset = words[index : index + 3]
            bits = offset >> 24 if header.flag else 0
            found.append(
                Member(
                    self._index.string(name), member_type, offset & 0xFFFFFF if header.flag else offset, bits
                )
            )
        return found

    def array(self, type_id: int) -> tuple[int, int]:
        """Element type and number of elements of an array."""
        if self.type(type_id).kind is not Kind.ARRAY:
            raise BtfError(f"type {type_id} is no array")
        words, at = self._index.locate(type_id)
        return words[at + 3], words[at + 5]

    def integer(self, type_id: int) -> tuple[bool, bool]:
        """Whether an integer is signed, and whether it is a boolean."""
        if self.type(type_id).kind is not Kind.INT:
            raise BtfError(f"type {type_id} is no integer")
        words, at = self._index.locate(type_id)
        return bool(words[at + 3] >> 24 & 1), bool(words[at + 3] >> 24 & 4)

    def strip(self, type_id: int) -> BtfType:
        """The type behind typedefs and qualifiers.

        Raises:
            BtfError: they never end.
        """
        for _ in range(_MAX_DEPTH):
            found = self.type(type_id)
            if found.kind not in _MODIFIERS:
                return found
            type_id = found.value
        raise BtfError(f"corrupt BTF: typedefs and qualifiers of type {type_id} never end")

    def size_of(self, type_id: int) -> int:
        """Size of a type in bytes, as C's sizeof.

        Raises:
            BtfError: the type has no size (a function, void, a forward declaration), or is an endless array.
        """
        count = 1
        for _ in range(_MAX_DEPTH):
            found = self.strip(type_id)
            if found.kind is Kind.PTR:
                return count * _POINTER_BYTES
            if found.kind in _SIZED:
                return count * found.value
            if found.kind is not Kind.ARRAY:
                raise BtfError(f"type {found.id} ({found.kind.name.lower()} {found.name}) has no size")
            type_id, elements = self.array(found.id)
            count *= elements
        raise BtfError(f"corrupt BTF: the array type {type_id} never ends")
