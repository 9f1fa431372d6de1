# SPDX-License-Identifier: Apache-2.0
"""C definitions of kernel structures, written from BTF with the layout of the running kernel.

Every structure is packed and every hole is a member, so no compiler's alignment rules can move anything; the outermost
one has its alignment back, so a compiler still loads whole words.
"""

import math
import re
from typing import Final

from kptrace.kernel.btf import Btf, BtfError, BtfType, Kind, Member

_MAX_DEPTH: Final = 24
# Far beyond any kernel structure: what a corrupt blob may cost.
_MAX_MEMBERS: Final = 50_000
_WORD: Final = {1: "char", 2: "short", 4: "int", 8: "long long"}
# BTF also describes types of languages whose names are no C identifiers.
_IDENTIFIER: Final = re.compile(r"[A-Za-z_]\w*", re.ASCII)


def struct_definition(btf: Btf, name: str) -> str:
    """The structure as C text with exact offsets and size.

    Nested structures and unions are written out in place; pointers keep the name of the structure that they point to.
    What C cannot say here (foreign names, 16-byte numbers) becomes bytes.

    Raises:
        BtfMissing: there is no such structure.
        BtfError: the BTF contradicts itself.
    """
    found = btf.type(btf.struct_id(name))
    if not _IDENTIFIER.fullmatch(name):
        raise BtfError(f"{name} is no structure of C")
    body = _Writer(btf).aggregate(found.id, 0)
    alignment = math.gcd(found.value, 8) or 8
    return f"struct {name} {body} __attribute__((packed, aligned({alignment})));\n"


class _Writer:
    def __init__(self, btf: Btf) -> None:
        self._btf = btf
        self._members = 0
        self._holes = 0

    def aggregate(self, type_id: int, depth: int) -> str:
        """The braces of a structure or union and what is between them."""
        header = self._btf.type(type_id)
        members = self._btf.members(type_id)
        self._members += len(members)
        if depth > _MAX_DEPTH or self._members > _MAX_MEMBERS:
            raise BtfError(f"corrupt BTF: the structure {header.name} never ends")
        indent = "\t" * (depth + 1)
        lines: list[str] = []
        at = end = 0  # bits
        for member in members:
            if member.name and not _IDENTIFIER.fullmatch(member.name):
                continue  # the next hole covers it
            bits = member.bits or 8 * self._btf.size_of(member.type_id)
            if member.bit_offset < at or member.bit_offset + bits > 8 * header.value:
                raise BtfError(
                    f"corrupt BTF: the member {member.name} of {header.name} lies outside its place"
                )
            lines += self._hole(at, member.bit_offset)
            lines.append(self._declare(member, bits, depth))
            end = max(end, member.bit_offset + bits)
            at = end if header.kind is Kind.STRUCT else 0
        if end < 8 * header.value:
            lines += self._hole(at, 8 * header.value)
        inside = "".join(f"{indent}{line}\n" for line in lines)
        return f"{{\n{inside}{indent[1:]}}}"

    def _hole(self, start: int, end: int) -> list[str]:
        """Declarations that fill the bits between two members."""
        lines = []
        to_byte = min(-start % 8, end - start)
        if to_byte:
            lines.append(f"unsigned char : {to_byte};")
        count, rest = divmod(end - start - to_byte, 8)
        if count:
            lines.append(f"unsigned char {self._hole_name()}[{count}];")
        if rest:
            lines.append(f"unsigned char : {rest};")
        return lines

    def _hole_name(self) -> str:
        self._holes += 1
        return f"__hole{self._holes}"

    def _declare(self, member: Member, bits: int, depth: int) -> str:
        if member.bits:
            word = self._scalar(self._btf.strip(member.type_id)) or "unsigned long long"
            return f"{word} {member.name} : {member.bits};"
        return self._declaration(member, bits // 8, depth)

    def _declaration(self, member: Member, size: int, depth: int) -> str:
        found, dimensions = self._btf.strip(member.type_id), ""
        while found.kind is Kind.ARRAY and len(dimensions) < 100:
            element, count = self._btf.array(found.id)
            found, dimensions = self._btf.strip(element), f"{dimensions}[{count}]"
        if found.kind in (Kind.STRUCT, Kind.UNION):
            body = f"{found.kind.name.lower()} {self.aggregate(found.id, depth + 1)} __attribute__((packed))"
            return f"{body} {member.name}{dimensions};" if member.name else f"{body};"
        scalar = self._scalar(found)
        name = member.name or self._hole_name()
        if scalar:
            return f"{scalar} {name}{dimensions};"
        return f"unsigned char {name}[{size}];"

    def _scalar(self, found: BtfType) -> str:
        """C's name of a number or pointer; empty if it has none here."""
        if found.kind is Kind.PTR:
            target = self._btf.strip(found.value)
            named = target.kind is Kind.STRUCT and _IDENTIFIER.fullmatch(target.name)
            return f"struct {target.name}*" if named else "void*"
        if found.value not in _WORD:
            return ""
        if found.kind is Kind.INT:
            signed, boolean = self._btf.integer(found.id)
            if boolean:
                return "_Bool" if found.value == 1 else ""
            return f"{'signed' if signed else 'unsigned'} {_WORD[found.value]}"
        if found.kind in (Kind.ENUM, Kind.ENUM64):
            return f"{'signed' if found.flag else 'unsigned'} {_WORD[found.value]}"
        return ""
