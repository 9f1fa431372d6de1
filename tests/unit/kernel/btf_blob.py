# SPDX-License-Identifier: Apache-2.0
"""A tiny BTF writer: blobs built type by type, independent of the parser under test."""

import struct
from collections.abc import Sequence

_U32 = 0xFFFFFFFF


class Blob:
    """Collects types; every method returns the id of the type that it added."""

    def __init__(self, first_id: int = 1, first_string: int = 0) -> None:
        self.types = b""
        self.strings = b"\0"
        self._next = first_id
        self._first_string = first_string

    @property
    def end_id(self) -> int:
        """The id that the next type gets."""
        return self._next

    def string(self, text: str) -> int:
        """Offset of the text, sharing an earlier string's end where there is one."""
        if not text:
            return 0
        wanted = text.encode() + b"\0"
        at = self.strings.find(wanted)
        if at < 0:
            at = len(self.strings)
            self.strings += wanted
        return self._first_string + at

    def add(
        self,
        kind: int,
        name: str = "",
        value: int = 0,
        *,
        vlen: int = 0,
        flag: bool = False,
        tail: Sequence[int] = (),
    ) -> int:
        """Any type, its tail given as words."""
        words = (self.string(name), (flag << 31) | kind << 24 | vlen, value, *(word & _U32 for word in tail))
        self.types += struct.pack(f"={len(words)}I", *words)
        self._next += 1
        return self._next - 1

    def integer(self, name: str, size: int) -> int:
        """A signed integer."""
        return self.add(1, name, size, tail=(1 << 24 | size * 8,))

    def struct(
        self,
        name: str,
        size: int,
        members: Sequence[tuple[str, int, int]],
        *,
        union: bool = False,
        flag: bool = False,
    ) -> int:
        """A structure of (name, type, offset word); the word is bits, or width and bits with the flag."""
        tail = [word for member, type_id, at in members for word in (self.string(member), type_id, at)]
        return self.add(5 if union else 4, name, size, vlen=len(members), flag=flag, tail=tail)

    def enum(self, name: str, values: Sequence[tuple[str, int]], *, signed: bool = False) -> int:
        """A 32-bit enum."""
        tail = [word for member, value in values for word in (self.string(member), value)]
        return self.add(6, name, 4, vlen=len(values), flag=signed, tail=tail)

    def enum64(self, name: str, values: Sequence[tuple[str, int]], *, signed: bool = False) -> int:
        """A 64-bit enum."""
        tail = [word for member, value in values for word in (self.string(member), value, value >> 32)]
        return self.add(19, name, 8, vlen=len(values), flag=signed, tail=tail)

    def function(self, name: str, parameters: Sequence[tuple[str, int]]) -> int:
        """A function and its prototype; the function's id is returned."""
        tail = [word for parameter, type_id in parameters for word in (self.string(parameter), type_id)]
        prototype = self.add(13, "", 0, vlen=len(parameters), tail=tail)
        return self.add(12, name, prototype)

    def pack(self, *, strings: bytes | None = None) -> bytes:
        """The whole blob."""
        strings = self.strings if strings is None else strings
        header = struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(self.types), len(self.types), len(strings))
        return header + self.types + strings
