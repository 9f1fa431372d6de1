# SPDX-License-Identifier: Apache-2.0
"""Where the members of a map's keys and values lie, and numbers and addresses in and out of there. Pure."""

import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

_CODES: Final = {1: "B", 2: "H", 4: "I", 8: "Q"}


@dataclass(frozen=True, slots=True)
class Field:
    """A member of a key or value.

    Attributes:
        name: Cilium's, or a plainer one.
        offset, size: bytes.
        network: whether a number's bytes lie in network order.
        plain: whether it is no number, but bytes as they are: an address.
    """

    name: str
    offset: int
    size: int
    network: bool = False
    plain: bool = False

    @property
    def code(self) -> str:
        """How `struct` calls it."""
        return f"{self.size}s" if self.plain else _CODES[self.size]


@dataclass(frozen=True)
class Record:
    """A key or value: its size, and the members that are read, by offset. The rest is padding, or of no interest here."""

    size: int
    members: tuple[Field, ...] = ()

    def decode(self, data: bytes) -> dict[str, Any]:
        """The members by name: numbers, and bytes of what is plain.

        Raises:
            ValueError: the bytes are not as many as they must be.
        """
        if len(data) != self.size:
            raise ValueError(f"{len(data)} bytes where the layout has {self.size}")
        found: dict[str, Any] = {}
        for names, form in self._forms:
            found.update(zip(names, form.unpack(data), strict=True))
        return found

    def encode(self, values: Mapping[str, Any]) -> bytes:
        """A record with these members and the rest 0; members that this layout does not have are left out.

        Raises:
            struct.error: a number is too large for its member.
        """
        data = bytearray(self.size)
        for field in self.members:
            if field.name in values:
                order = ">" if field.network else "="
                struct.pack_into(order + field.code, data, field.offset, values[field.name])
        return bytes(data)

    @cached_property
    def _forms(self) -> tuple[tuple[tuple[str, ...], struct.Struct], ...]:
        """`struct` knows one byte order at a time: the members in host order, and those in network order."""
        forms = []
        for order, network in (("=", False), (">", True)):
            codes, end = order, 0
            fields = [field for field in self.members if field.network is network]
            for field in fields:
                codes += f"{field.offset - end}x{field.code}"
                end = field.offset + field.size
            names = tuple(field.name for field in fields)
            forms.append((names, struct.Struct(f"{codes}{self.size - end}x")))
        return tuple(forms)


def address_text(packed: bytes) -> str:
    """An IP address in text form, as everything here has it."""
    return socket.inet_ntop(socket.AF_INET if len(packed) == 4 else socket.AF_INET6, packed)


def address_bytes(text: str) -> bytes:
    """The reverse of `address_text`."""
    return socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text)
