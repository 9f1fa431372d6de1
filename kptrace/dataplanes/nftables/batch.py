# SPDX-License-Identifier: Apache-2.0
"""What an nfnetlink batch changes, from a bounded copy of the writer's own bytes. Pure; never raises.

A listener on the nftables group would tell the same, but slows the writer's commit by three quarters.
"""

from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, TypeVar

from kptrace.dataplanes.nftables.netlink import (
    ATTRIBUTES,
    HEADER,
    NFNL_SUBSYS_NFTABLES,
    NetlinkError,
    NftMessage,
    attributes,
    messages,
    text,
)
from kptrace.model.rewrite import ObjectCount

BATCH_BEGIN: Final = 0x10
BATCH_END: Final = 0x11
#: Bytes at a buffer's end that tell whether it ends with BATCH_END: `struct nlmsghdr` and `struct nfgenmsg`.
TAIL_BYTES: Final = ATTRIBUTES

MAX_TABLES: Final = 64
MAX_CHAINS: Final = 4096

_FAMILY_NAMES: Final = {1: "inet", 2: "ipv4", 3: "arp", 5: "netdev", 7: "bridge", 10: "ipv6"}
_TABLE = 1  # the attribute with the table's name, in every kind of message
_CHAIN_NAME, _CHAIN_HANDLE, _CHAIN_HOOK = 3, 2, 4
_RULE_CHAIN, _RULE_HANDLE, _RULE_ID = 2, 3, 9
_ELEMENTS = 3

_ADD, _DELETE, _FLUSH = "add", "delete", "flush"
_MEANING: Final = {
    NftMessage.NEWTABLE: ("table", _ADD),
    NftMessage.NEWCHAIN: ("chain", _ADD),
    NftMessage.NEWRULE: ("rule", _ADD),
    NftMessage.NEWSET: ("set", _ADD),
    NftMessage.NEWSETELEM: ("element", _ADD),
    NftMessage.NEWOBJ: ("object", _ADD),
    NftMessage.NEWFLOWTABLE: ("flowtable", _ADD),
    NftMessage.DELTABLE: ("table", _DELETE),
    NftMessage.DELCHAIN: ("chain", _DELETE),
    NftMessage.DELRULE: ("rule", _DELETE),
    NftMessage.DELSET: ("set", _DELETE),
    NftMessage.DELSETELEM: ("element", _DELETE),
    NftMessage.DELOBJ: ("object", _DELETE),
    NftMessage.DELFLOWTABLE: ("flowtable", _DELETE),
    NftMessage.DESTROYTABLE: ("table", _DELETE),
    NftMessage.DESTROYCHAIN: ("chain", _DELETE),
    NftMessage.DESTROYRULE: ("rule", _DELETE),
    NftMessage.DESTROYSET: ("set", _DELETE),
    NftMessage.DESTROYSETELEM: ("element", _DELETE),
    NftMessage.DESTROYOBJ: ("object", _DELETE),
    NftMessage.DESTROYFLOWTABLE: ("flowtable", _DELETE),
}
_Name = TypeVar("_Name")
_BY_NUMBER: Final = {int(message): meaning for message, meaning in _MEANING.items()}


class BatchKind(StrEnum):
    """What the kernel will do with a batch in which it finds no error."""

    COMMITTABLE = "committable"
    CHECKED = "checked"  # no BATCH_END: `nft --check`
    EMPTY = "empty"  # no nf_tables message in it
    UNKNOWN = "unknown"  # the copy ends before the batch does


@dataclass(frozen=True, slots=True)
class Batch:
    """What a batch asks for, as far as the copy tells.

    Attributes:
        kind: whether it can commit at all.
        truncated: the copy, or a bound, was too small to know everything: what is said here is part of what changed.
        tables: (family, table) touched, family as in `objects`.
        objects: counts by table, object (table, chain, rule, set, element, object, flowtable) and operation. `add` is
            also said of what exists already (kube-proxy adds a chain before it flushes it); `delete` of a table or
            chain also takes what is in it; `flush` is one request that deletes all rules of a chain or table, or all
            elements of a set, in a number that the batch does not tell.
        touched_chains: (family, table, chain) that were added, deleted or had a rule changed.
        deleted_chains: those of them that the batch deletes by name: a re-plan is needed if one is a base chain.
        base_chain_touched: a base chain may have come, changed or gone, other than by `deleted_chains`: a table was
            added or deleted, a chain with a hook was added, a chain was renamed or deleted by its handle, or the copy
            is truncated.
    """

    kind: BatchKind
    truncated: bool = False
    tables: frozenset[tuple[str, str]] = frozenset()
    objects: tuple[ObjectCount, ...] = ()
    touched_chains: frozenset[tuple[str, str, str]] = frozenset()
    deleted_chains: frozenset[tuple[str, str, str]] = frozenset()
    base_chain_touched: bool = False


def is_batch(data: bytes) -> bool:
    """Whether a buffer starts like an nfnetlink batch."""
    return len(data) >= HEADER.size and HEADER.unpack_from(data)[1] == BATCH_BEGIN


def decode_batch(data: bytes, size: int | None = None, tail: bytes = b"") -> Batch:
    """Decode a batch.

    Args:
        data: the beginning of the writer's buffer.
        size: bytes of the whole buffer, where the writer's system call told; by default what `data` has.
        tail: the buffer's last `TAIL_BYTES`, if known: they tell a batch that commits from one that is only checked,
            though the copy ends before.
    """
    whole = len(data) if size is None else size
    decoder = _Decoder(data[:whole])
    return decoder.run(cut=whole > len(data), ends=is_end(tail))


def is_end(tail: bytes) -> bool:
    """Whether these last bytes of a buffer are a BATCH_END."""
    if len(tail) < TAIL_BYTES:
        return False
    length, kind = HEADER.unpack_from(tail, len(tail) - TAIL_BYTES)[:2]
    return bool(length == TAIL_BYTES and kind == BATCH_END)


@dataclass(slots=True)
class _Decoder:
    data: bytes
    counts: Counter[tuple[str, str, str, str]] = field(default_factory=Counter)
    tables: set[tuple[str, str]] = field(default_factory=set)
    touched: set[tuple[str, str, str]] = field(default_factory=set)
    deleted: set[tuple[str, str, str]] = field(default_factory=set)
    replan: bool = False
    full: bool = False

    def run(self, *, cut: bool, ends: bool) -> Batch:
        ended, changes = ends, False
        try:
            for kind, _, _, start, end in messages(self.data):
                if kind == BATCH_END:
                    ended = True
                elif (
                    kind >> 8 == NFNL_SUBSYS_NFTABLES
                    and end - start >= ATTRIBUTES
                    and kind & 0xFF in _BY_NUMBER
                ):
                    changes = True
                    self._change(kind & 0xFF, start, end)
        except NetlinkError:
            cut = True
        if ended:
            kind_of_batch = BatchKind.COMMITTABLE if changes or cut else BatchKind.EMPTY
        elif cut:
            kind_of_batch = BatchKind.UNKNOWN
        else:
            kind_of_batch = BatchKind.CHECKED if changes else BatchKind.EMPTY
        truncated = cut or self.full
        return Batch(
            kind=kind_of_batch,
            truncated=truncated,
            tables=frozenset(self.tables),
            objects=tuple(ObjectCount(*key, count) for key, count in sorted(self.counts.items()) if count),
            touched_chains=frozenset(self.touched),
            deleted_chains=frozenset(self.deleted),
            base_chain_touched=self.replan or truncated,
        )

    def _change(self, number: int, start: int, end: int) -> None:
        thing, operation = _BY_NUMBER[number]
        # The first of each kind of attribute; the kernel refuses a message that repeats one.
        found: dict[int, tuple[int, int]] = {}
        for kind, low, high in attributes(self.data, start + ATTRIBUTES, end):
            found.setdefault(kind, (low, high))
        family = _FAMILY_NAMES.get(self.data[start + HEADER.size], "other")
        table = self._name(found, _TABLE)
        if not self._admit(self.tables, (family, table), MAX_TABLES):
            return
        count = 1
        if thing == "table":
            self.replan = True
        elif thing == "chain":
            self._chain(found, family, table, operation)
        elif thing == "rule":
            if _RULE_CHAIN in found:
                self._admit(self.touched, (family, table, self._name(found, _RULE_CHAIN)), MAX_CHAINS)
            if operation == _DELETE and _RULE_HANDLE not in found and _RULE_ID not in found:
                operation = _FLUSH
        elif thing == "element":
            if _ELEMENTS in found:
                count = sum(1 for _ in attributes(self.data, *found[_ELEMENTS]))
            elif operation == _DELETE:
                operation = _FLUSH
        self.counts[family, table, thing, operation] += count

    def _chain(self, found: dict[int, tuple[int, int]], family: str, table: str, operation: str) -> None:
        named = (family, table, self._name(found, _CHAIN_NAME)) if _CHAIN_NAME in found else None
        if named:
            self._admit(self.touched, named, MAX_CHAINS)
        if operation == _DELETE:
            if named:
                self._admit(self.deleted, named, MAX_CHAINS)
            # With a hook, a delete takes devices from a base chain; without a name it is by handle.
            self.replan |= named is None or _CHAIN_HOOK in found
        else:
            # A handle beside a name renames the chain that has it.
            self.replan |= _CHAIN_HOOK in found or _CHAIN_HANDLE in found

    def _name(self, found: dict[int, tuple[int, int]], kind: int) -> str:
        return text(self.data, *found[kind]) if kind in found else ""

    def _admit(self, names: set[_Name], name: _Name, limit: int) -> bool:
        if name in names:
            return True
        if len(names) >= limit:
            self.full = True
            return False
        names.add(name)
        return True
