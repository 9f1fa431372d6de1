# SPDX-License-Identifier: Apache-2.0
"""Questions by name to the kernel's own type information: offsets of members, ids, parameters, enumerators.

Names are looked up by finding the string and then the types that point to it, so nothing but the answer is decoded. A
blob comes from outside this program: whatever is in it, a question ends with an answer or a `BtfError`.
"""

import hashlib
from pathlib import Path

from kptrace.kernel.btf_format import BtfError, BtfMissing, BtfType, Kind, Member, Tables, decode
from kptrace.kernel.btf_index import Index
from kptrace.kernel.btf_types import AGGREGATES, Types

__all__ = ["Btf", "BtfError", "BtfMissing", "BtfType", "Kind", "Member"]


class Btf(Types):
    """One BTF blob, and the base that a module's blob continues."""

    def __init__(self, tables: Tables, digest: str, base: "Btf | None" = None) -> None:
        super().__init__(Index(tables, base._index if base else None))
        self.digest = digest

    @classmethod
    def parse(cls, data: bytes, base: "Btf | None" = None) -> "Btf":
        """Index a blob; `base` is the vmlinux BTF that a module's blob continues.

        Raises:
            BtfError: the data is no BTF of this machine, is cut short or contradicts itself.
        """
        return cls(decode(data), hashlib.sha256(data).hexdigest(), base)

    @classmethod
    def load(cls, path: Path, base: "Btf | None" = None) -> "Btf":
        """Read and index a file such as /sys/kernel/btf/vmlinux.

        Raises:
            BtfError: the file cannot be read, or `parse` refuses it.
        """
        try:
            data = path.read_bytes()
        except OSError as error:
            raise BtfError(
                f"cannot read BTF from {path}: {error.strerror}",
                errno=error.errno or 0,
                remedy="use a kernel with CONFIG_DEBUG_INFO_BTF",
            ) from error
        return cls.parse(data, base)

    def type_id(self, name: str, kind: Kind) -> int:
        """Id of the first type of that name and kind; a module's own types come before the base's.

        Raises:
            BtfMissing: there is none.
        """
        for found in self._index.named(name, (kind,)):
            return found
        raise BtfMissing(name, kind.name.lower())

    def func_id(self, name: str) -> int:
        """Id of a function, kfuncs included; raises `BtfMissing`."""
        return self.type_id(name, Kind.FUNC)

    def struct_id(self, name: str) -> int:
        """Id of a structure (never of a forward declaration); raises `BtfMissing`."""
        return self.type_id(name, Kind.STRUCT)

    def function_pointers(self, name: str) -> tuple[str, ...]:
        """What a function's named parameters point to: the structure's name, or nothing for void and for numbers.

        Raises:
            BtfMissing: there is no such function.
        """
        return tuple(self._pointed_to(type_id) for type_id in self._parameters(name))

    def function_sizes(self, name: str) -> tuple[int, ...]:
        """Sizes of a function's named parameters in bytes.

        Raises:
            BtfMissing: there is no such function.
        """
        return tuple(self.size_of(type_id) for type_id in self._parameters(name))

    def _parameters(self, name: str) -> list[int]:
        """Type ids of a function's named parameters."""
        prototype = self.type(self.type(self.func_id(name)).value)
        if prototype.kind is not Kind.FUNC_PROTO:
            raise BtfError(f"corrupt BTF: the function {name} has no prototype")
        words, at = self._index.locate(prototype.id)
        parameters = [tuple(words[at + 3 + 2 * n : at + 5 + 2 * n]) for n in range(prototype.vlen)]
        if parameters and not any(parameters[-1]):
            parameters.pop()  # "..." is a last parameter without name and type
        return [type_id for _, type_id in parameters]

    def _pointed_to(self, type_id: int) -> str:
        pointer = self.strip(type_id)
        target = self.strip(pointer.value) if pointer.kind is Kind.PTR else None
        return target.name if target and target.kind in (*AGGREGATES, Kind.FWD) else ""

    def enum_value(self, enumerator: str) -> int:
        """Value of an enumerator of any enum.

        Raises:
            BtfMissing: there is none.
            BtfError: two enums disagree, and no guess is made.
        """
        values = set(self._index.enumerator_values(enumerator))
        if not values:
            raise BtfMissing(enumerator, "enumerator")
        if len(values) > 1:
            raise BtfError(f"the enumerator {enumerator} has several values in this BTF: {sorted(values)}")
        return values.pop()

    def member_offset(self, struct_name: str, path: str) -> int:
        """Offset of a member in bytes; see `member`.

        Raises:
            BtfMissing: there is no such structure or member.
            BtfError: the member is a bitfield that does not begin at a byte.
        """
        bits = self.member(struct_name, path).bit_offset
        if bits % 8:
            raise BtfError(f"{struct_name}.{path} does not begin at a byte but at bit {bits}")
        return bits // 8

    def member_offset_bits(self, struct_name: str, path: str) -> int:
        """Offset of a member in bits; see `member`."""
        return self.member(struct_name, path).bit_offset

    def member(self, struct_name: str, path: str) -> Member:
        """The member of a structure, union or typedef of one; `ns.inum` goes through the named member `ns`.

        Members of anonymous structures and unions are found as in C. Where several types have the name (the kernel has
        such), the first that has the member answers.

        Raises:
            BtfMissing: there is no such structure or member.
        """
        candidates = list(self._index.named(struct_name, (*AGGREGATES, Kind.TYPEDEF)))
        if not candidates:
            raise BtfMissing(struct_name, "struct")
        for type_id in candidates:
            found = self._descend(type_id, path)
            if found:
                return found
        raise BtfMissing(f"{struct_name}.{path}", "member")

    def _descend(self, type_id: int, path: str) -> Member | None:
        offset = 0
        found: Member | None = None
        for part in path.split("."):
            found = self._find_member(type_id, part)
            if not found:
                return None
            offset += found.bit_offset
            type_id = found.type_id
        return Member(found.name, found.type_id, offset, found.bits) if found else None

    def _find_member(self, type_id: int, name: str) -> Member | None:
        """Search breadth first through anonymous members; each type once, so cycles and fans end."""
        seen: set[int] = set()
        waiting = [(type_id, 0)]
        for current, base in waiting:
            aggregate = self.strip(current)
            if aggregate.id in seen:
                continue
            seen.add(aggregate.id)
            for member in self.members(aggregate.id):
                if member.name == name and name:
                    return Member(name, member.type_id, base + member.bit_offset, member.bits)
                if not member.name:
                    waiting.append((member.type_id, base + member.bit_offset))
        return None
