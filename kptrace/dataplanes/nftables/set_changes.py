# SPDX-License-Identifier: Apache-2.0
"""What messages of nf_tables do to the sets and maps of an inventory, and to their elements. Pure."""

from collections.abc import Iterator
from typing import Final

from kptrace.dataplanes.nftables.netlink import NftMessage, attributes, be32
from kptrace.dataplanes.nftables.object_message import ObjectMessage
from kptrace.dataplanes.nftables.objects import SetObjects

_SET_ANONYMOUS, _SET_TIMEOUT, _SET_EVAL = 0x1, 0x10, 0x20
_ELEMENT_END, _ELEMENT_CATCHALL = 0x1, 0x2
_SET_NAME, _SET_FLAGS = 2, 3
_ELEMENTS_SET, _ELEMENTS = 2, 3
_ELEMENT_KEY, _ELEMENT_FLAGS = 1, 3

#: Messages about sets and their elements that tell what they do.
SET_MESSAGES: Final = frozenset(
    {NftMessage.NEWSET, NftMessage.DELSET, NftMessage.NEWSETELEM, NftMessage.DELSETELEM}
)


class SetChange(ObjectMessage):
    """A message about a set or its elements."""

    def apply(self, number: int) -> None:
        """Take it in, as one of `SET_MESSAGES`."""
        match number:
            case NftMessage.NEWSET:
                self._new_set()
            case NftMessage.DELSET:
                self._delete_set()
            case NftMessage.NEWSETELEM:
                self._new_elements()
            case NftMessage.DELSETELEM:
                self._delete_elements()

    def _new_set(self) -> None:
        table, flags = self.table, self.number(_SET_FLAGS)
        if flags & _SET_ANONYMOUS:
            return
        if table is None:
            self.inexact()
        else:
            name = self.text(_SET_NAME)
            if name in table.sets or self.inventory.room_for_name():
                table.sets.setdefault(name, SetObjects()).dynamic = bool(flags & (_SET_TIMEOUT | _SET_EVAL))

    def _delete_set(self) -> None:
        table, name = self.table, self.text(_SET_NAME)
        if table is None or not name:
            self.inexact()
        elif name in table.sets:
            self.inventory.drop_elements(len(table.sets.pop(name).keys))
            self.inventory.drop_name()

    def _set(self) -> SetObjects | None:
        table, name = self.table, self.text(_ELEMENTS_SET)
        if table is None:
            self.inexact()
            return None
        if name not in table.sets:
            # An anonymous set, which has the pattern of its name to come (`__set%d`), or one by its number.
            if "%" not in name and not name.startswith("__"):
                self.inexact()
            return None
        return table.sets[name]

    def _keys(self) -> Iterator[int]:
        for _, low, high in attributes(self.data, *self.found[_ELEMENTS]):
            key, flags = b"", 0
            for kind, start, end in attributes(self.data, low, high):
                if kind == _ELEMENT_KEY:
                    key = self.data[start:end]
                elif kind == _ELEMENT_FLAGS:
                    flags = be32(self.data, start, end)
            if flags & _ELEMENT_CATCHALL:
                key = b"*"
            if not flags & _ELEMENT_END:
                yield hash(_value(key))

    def _new_elements(self) -> None:
        target = self._set()
        if target is None or _ELEMENTS not in self.found:
            return
        for key in self._keys():
            if key not in target.keys and self.inventory.room_for_element():
                target.keys.add(key)

    def _delete_elements(self) -> None:
        target = self._set()
        if target is None:
            return
        before = len(target.keys)
        if _ELEMENTS in self.found:
            target.keys.difference_update(self._keys())
        else:
            target.keys.clear()
        self.inventory.drop_elements(before - len(target.keys))


def _value(key: bytes) -> bytes:
    """The value inside a nested NFTA_DATA_VALUE: its header's flags differ between requests and dumps."""
    return next((key[start:end] for _, start, end in attributes(key, 0, len(key))), key)
