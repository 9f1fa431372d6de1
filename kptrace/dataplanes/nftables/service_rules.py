# SPDX-License-Identifier: Apache-2.0
"""The messages of a batch that concern kube-proxy's table, as plain changes in their order. Pure; never raises."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

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
from kptrace.dataplanes.nftables.service_names import TABLE, address_text
from kptrace.model.netfilter import IpFamily

_FAMILIES: Final = {family.nfproto: family for family in IpFamily}
_TABLE, _CHAIN_NAME, _RULE_CHAIN = 1, 3, 2
_ELEMENTS_SET, _ELEMENTS = 2, 3
_ELEMENT_KEY, _ELEMENT_DATA, _ELEMENT_USERDATA = 1, 2, 6
_DATA_VALUE, _DATA_VERDICT, _VERDICT_CHAIN = 1, 2, 2
_COMMENT = 0  # NFTNL_UDATA_SET_ELEM_COMMENT: one byte type, one byte length, the text with its NUL

Range = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Change:
    """One thing that a message does.

    Attributes:
        family: of the table.
        what: `table`, `chain`, `rule`, or `element` of a named set or map.
        added: false for a deletion. A rule that is deleted is left out, as is a chain that is.
        name: of the chain, or of the set.
        key: the element's.
        target: the chain that the element goes to.
        comment: the element's.
        addresses: what the anonymous map in a rule leads to: address and port.
        targets: or chains.
    """

    family: IpFamily
    what: Literal["table", "chain", "rule", "element"]
    added: bool
    name: str = ""
    key: bytes = b""
    target: str = ""
    comment: str = ""
    addresses: tuple[tuple[str, int], ...] = ()
    targets: tuple[str, ...] = ()


def read_changes(data: bytes) -> tuple[list[Change], bool]:
    """The changes, and whether the buffer ends within a message."""
    reader = _Reader(data)
    try:
        for kind, _, _, start, end in messages(data):
            if kind >> 8 == NFNL_SUBSYS_NFTABLES and end - start >= ATTRIBUTES:
                reader.read(kind & 0xFF, start, end)
    except NetlinkError:
        return reader.changes, True
    return reader.changes, False


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.changes: list[Change] = []
        self._data = data
        # An anonymous map comes right before the rule that it is made for.
        self._addresses: list[tuple[str, int]] = []
        self._targets: list[str] = []

    def read(self, number: int, start: int, end: int) -> None:
        family = _FAMILIES.get(self._data[start + HEADER.size])
        found = self._attributes(start + ATTRIBUTES, end)
        if family is None or self._name(found, _TABLE) != TABLE:
            return
        match number:
            case NftMessage.NEWTABLE:
                self.changes.append(Change(family, "table", added=True))
            case NftMessage.NEWCHAIN:
                self.changes.append(Change(family, "chain", added=True, name=self._name(found, _CHAIN_NAME)))
            case NftMessage.NEWRULE:
                self._rule(family, self._name(found, _RULE_CHAIN))
            case NftMessage.NEWSETELEM | NftMessage.DELSETELEM:
                self._elements(family, found, added=number == NftMessage.NEWSETELEM)

    def _rule(self, family: IpFamily, chain: str) -> None:
        addresses, targets = tuple(self._addresses), tuple(self._targets)
        self.changes.append(
            Change(family, "rule", added=True, name=chain, addresses=addresses, targets=targets)
        )
        self._addresses.clear()
        self._targets.clear()

    def _elements(self, family: IpFamily, found: dict[int, Range], *, added: bool) -> None:
        name = self._name(found, _ELEMENTS_SET)
        anonymous = name.startswith("__")
        for _, low, high in attributes(self._data, *found.get(_ELEMENTS, (0, 0))):
            element = self._attributes(low, high)
            value, target = self._value(element)
            if not anonymous:
                key, _ = self._nested(element.get(_ELEMENT_KEY))
                comment = self._comment(element)
                self.changes.append(Change(family, "element", added, name, key, target, comment))
            elif target:
                self._targets.append(target)
            elif len(value) in (8, 20):  # an address and a port, each as wide as a multiple of four bytes
                number = int.from_bytes(value[-4:-2], "big")
                self._addresses.append((address_text(value[:-4]), number))

    def _value(self, element: dict[int, Range]) -> tuple[bytes, str]:
        return self._nested(element.get(_ELEMENT_DATA))

    def _nested(self, place: Range | None) -> tuple[bytes, str]:
        """The value, or the chain of the verdict, in an NFTA_DATA."""
        inner = self._attributes(*place) if place else {}
        if _DATA_VERDICT in inner:
            return b"", self._name(self._attributes(*inner[_DATA_VERDICT]), _VERDICT_CHAIN)
        low, high = inner.get(_DATA_VALUE, (0, 0))
        return self._data[low:high], ""

    def _comment(self, element: dict[int, Range]) -> str:
        low, high = element.get(_ELEMENT_USERDATA, (0, 0))
        while low + 2 <= high:
            kind, length = self._data[low], self._data[low + 1]
            if kind == _COMMENT:
                return text(self._data, low + 2, min(high, low + 2 + length))
            low += 2 + length
        return ""

    def _attributes(self, start: int, end: int) -> dict[int, Range]:
        return {kind: (low, high) for kind, low, high in self._every(start, end)}

    def _every(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        return attributes(self._data, start, end)

    def _name(self, found: dict[int, Range], kind: int) -> str:
        return text(self._data, *found[kind]) if kind in found else ""
