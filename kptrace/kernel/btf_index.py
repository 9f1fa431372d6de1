# SPDX-License-Identifier: Apache-2.0
"""Finding types, strings and enumerators in the flat tables of a blob and of the base that it continues."""

import struct
from array import array
from bisect import bisect_right
from collections.abc import Iterator

from kptrace.kernel.btf_format import BtfError, Kind, Tables

# Up to so many values are searched one by one at C speed, more in one Python loop.
_FEW = 4


class Index:
    """Ids and string offsets of a module's blob count on where those of its base end."""

    def __init__(self, tables: Tables, base: "Index | None") -> None:
        self._tables = tables
        self._base = base
        self._first_id: int = base.end_id if base else 1
        self._first_string: int = base.end_string if base else 0
        self._asked = 0
        self._by_name: dict[int, list[int]] = {}

    @property
    def end_id(self) -> int:
        """One more than the highest type id."""
        return self._first_id + len(self._tables.starts)

    @property
    def end_string(self) -> int:
        """One more than the highest string offset."""
        return self._first_string + len(self._tables.strings)

    def locate(self, type_id: int) -> tuple["array[int]", int]:
        """The words that hold a type, and where in them it begins.

        Raises:
            BtfError: no type has this id.
        """
        owner = self
        while type_id < owner._first_id and owner._base:
            owner = owner._base
        index = type_id - owner._first_id
        if not 0 <= index < len(owner._tables.starts):
            raise BtfError(f"corrupt BTF: no type has the id {type_id}")
        return owner._tables.words, owner._tables.starts[index]

    def string(self, offset: int) -> str:
        """The string at an offset.

        Raises:
            BtfError: the offset is beyond the strings.
        """
        owner = self
        while offset < owner._first_string and owner._base:
            owner = owner._base
        at = offset - owner._first_string
        strings = owner._tables.strings
        if at >= len(strings):
            if offset == 0:
                return ""
            raise BtfError(f"corrupt BTF: no string begins at {offset}")
        return strings[at : strings.index(b"\0", at)].decode(errors="replace")

    def named(self, name: str, kinds: tuple[Kind, ...]) -> Iterator[int]:
        """Ids of the types of that name and of one of these kinds, in order: this blob's own, then the base's."""
        tables = self._tables
        for index in self._places(self._offsets_of(name)):
            if (tables.words[tables.starts[index] + 1] >> 24) & 0x1F in kinds:
                yield self._first_id + index
        if self._base:
            yield from self._base.named(name, kinds)

    def _places(self, offsets: set[int]) -> list[int]:
        """Where the types of these names stand. The table of all names costs as much memory as the blob: only for many."""
        self._asked += 1
        if self._asked <= _FEW:
            return _positions(self._tables.names, offsets)
        if not self._by_name:
            for index, offset in enumerate(self._tables.names):
                self._by_name.setdefault(offset, []).append(index)
        return sorted(index for offset in offsets for index in self._by_name.get(offset, ()))

    def enumerator_values(self, name: str) -> Iterator[int]:
        """Values of the enumerators of that name."""
        words, starts = self._tables.words, self._tables.starts
        # The word may stand anywhere in a type: only where an enum has its names does it name an enumerator.
        for at in _positions(words, self._offsets_of(name)):
            start = starts[bisect_right(starts, at) - 1]
            info = words[start + 1]
            kind, signed, within = (info >> 24) & 0x1F, info >> 31, at - start - 3
            if kind == Kind.ENUM and within >= 0 and within % 2 == 0:
                yield struct.unpack("=i" if signed else "=I", struct.pack("=I", words[at + 1]))[0]
            elif kind == Kind.ENUM64 and within >= 0 and within % 3 == 0:
                halves = struct.pack("=Q", words[at + 1] | words[at + 2] << 32)
                yield struct.unpack("=q" if signed else "=Q", halves)[0]
        if self._base:
            yield from self._base.enumerator_values(name)

    def _offsets_of(self, name: str) -> set[int]:
        """Every offset at which this string can be read, ends of longer strings included."""
        if not name or "\0" in name:
            return set()
        found = self._base._offsets_of(name) if self._base else set()
        wanted, strings = name.encode(errors="replace") + b"\0", self._tables.strings
        at = strings.find(wanted)
        while at >= 0:
            found.add(self._first_string + at)
            at = strings.find(wanted, at + 1)
        return found


def _positions(table: "array[int]", values: set[int]) -> list[int]:
    """Where in the table any of these values stands, in order."""
    if len(values) > _FEW:
        return [at for at, value in enumerate(table) if value in values]
    found = []
    for value in values:
        at = -1
        try:
            while True:
                at = table.index(value, at + 1)
                found.append(at)
        except ValueError:
            continue
    return sorted(found)
