# SPDX-License-Identifier: Apache-2.0
"""What messages of nf_tables do to an inventory of objects: of a dump, and of a committed batch. Pure."""

from kptrace.dataplanes.nftables.netlink import (
    ATTRIBUTES,
    HEADER,
    NFNL_SUBSYS_NFTABLES,
    NetlinkError,
    NftMessage,
    attributes,
    be32,
    messages,
    text,
)
from kptrace.dataplanes.nftables.object_message import ObjectMessage
from kptrace.dataplanes.nftables.objects import Inventory, TableObjects
from kptrace.dataplanes.nftables.set_changes import SET_MESSAGES, SetChange

_NLM_F_REPLACE = 0x100
_CHAIN_BINDING = 0x4
_TABLE_OWNER = 0x2
_NETDEV, _INET_INGRESS, _HOOK_NUMBER = 5, 5, 1

_TABLE, _TABLE_FLAGS, _TABLE_HANDLE = 1, 2, 4
_CHAIN_HANDLE, _CHAIN_NAME, _CHAIN_HOOK, _CHAIN_FLAGS = 2, 3, 4, 10
_RULE_CHAIN, _RULE_HANDLE, _RULE_ID, _RULE_CHAIN_ID = 2, 3, 9, 11


def apply_batch(inventory: Inventory, data: bytes) -> None:
    """Take in a committed batch, given whole. The inventory becomes inexact where the batch does not tell enough."""
    try:
        for kind, flags, _, start, end in messages(data):
            if kind >> 8 == NFNL_SUBSYS_NFTABLES and end - start >= ATTRIBUTES:
                _message(inventory, kind & 0xFF, flags, data, start, end)
    except NetlinkError:
        inventory.exact = False


def take_object(inventory: Inventory, message: bytes) -> None:
    """Take in one object of a dump, header included."""
    kind, flags = HEADER.unpack_from(message)[1:3]
    if kind & 0xFF == NftMessage.NEWRULE:
        _take_rule(inventory, message)
    else:
        _message(inventory, kind & 0xFF, flags, message, 0, len(message))


def _take_rule(inventory: Inventory, message: bytes) -> None:
    """There are many, and long ones: only the first attributes are looked at."""
    name = ""
    for kind, low, high in attributes(message, ATTRIBUTES, len(message)):
        if kind == _TABLE:
            name = text(message, low, high)
        elif kind == _RULE_CHAIN:
            table = inventory.tables.get((message[HEADER.size], name))
            chain = text(message, low, high)
            if (
                table is not None and chain in table.chains
            ):  # the rules of an anonymous chain belong to its rule
                table.chains[chain] += 1
            return


def _message(inventory: Inventory, number: int, flags: int, data: bytes, start: int, end: int) -> None:
    found: dict[int, tuple[int, int]] = {}
    for kind, low, high in attributes(data, start + ATTRIBUTES, end):
        found.setdefault(kind, (low, high))
    family = data[start + HEADER.size]
    name = text(data, *found[_TABLE]) if _TABLE in found else ""
    if number in SET_MESSAGES:
        SetChange(inventory, data, found, family, name, flags).apply(number)
        return
    change = _Change(inventory, data, found, family, name, flags)
    match number:
        case NftMessage.NEWTABLE:
            change.new_table()
        case NftMessage.DELTABLE:
            change.delete_table()
        case NftMessage.NEWCHAIN:
            change.new_chain()
        case NftMessage.DELCHAIN:
            change.delete_chain()
        case NftMessage.NEWRULE:
            change.new_rule()
        case NftMessage.DELRULE:
            change.delete_rule()
        case (
            NftMessage.DESTROYTABLE
            | NftMessage.DESTROYCHAIN
            | NftMessage.DESTROYRULE
            | NftMessage.DESTROYSET
            | NftMessage.DESTROYSETELEM
        ):
            inventory.exact = False  # whether it was there is not told


class _Change(ObjectMessage):
    """A message about a table, a chain or a rule."""

    def new_table(self) -> None:
        tables, key = self.inventory.tables, (self.family, self.name)
        if key not in tables and self.inventory.room_for_name():
            tables[key] = TableObjects(owned=bool(self.number(_TABLE_FLAGS) & _TABLE_OWNER))

    def delete_table(self) -> None:
        if _TABLE in self.found and self.family:
            self.inventory.drop_table((self.family, self.name))
        elif _TABLE_HANDLE in self.found and self.family:
            self.inexact()
        else:  # all tables of the family, or all there are, or all of a name
            for (family, name), table in list(self.inventory.tables.items()):
                if self.family not in (0, family) or (_TABLE in self.found and name != self.name):
                    continue
                if table.owned:  # taken only if the owner asked
                    self.inexact()
                else:
                    self.inventory.drop_table((family, name))

    def new_chain(self) -> None:
        table, name = self.table, self.text(_CHAIN_NAME)
        if self.number(_CHAIN_FLAGS) & _CHAIN_BINDING:
            return
        if table is None or not name:
            self.inexact()
            return
        if name not in table.chains:
            if _CHAIN_HANDLE in self.found and not self.is_dumped():
                self.inexact()  # a chain gets another name
            elif self.inventory.room_for_name():
                table.chains[name] = 0
        if _CHAIN_HOOK in self.found:
            table.base.add(name)

    def delete_chain(self) -> None:
        table, name = self.table, self.text(_CHAIN_NAME)
        if table is None or not name:
            self.inexact()
        elif not self._loses_devices():
            table.base.discard(name)
            if table.chains.pop(name, None) is not None:
                self.inventory.drop_name()

    def _loses_devices(self) -> bool:
        """Whether a delete takes devices from a chain: elsewhere the kernel ignores the hook that iptables-nft sends."""
        if _CHAIN_HOOK not in self.found:
            return False
        number = next(
            (
                be32(self.data, start, end)
                for kind, start, end in attributes(self.data, *self.found[_CHAIN_HOOK])
                if kind == _HOOK_NUMBER
            ),
            0,
        )
        return self.family == _NETDEV or number == _INET_INGRESS

    def new_rule(self) -> None:
        table, chain = self.table, self.text(_RULE_CHAIN)
        if self.flags & _NLM_F_REPLACE and not self.is_dumped():
            return
        if table is not None and chain in table.chains:
            table.chains[chain] += 1
        elif not self.is_dumped() or not chain:
            self.inexact()  # a chain named by its id, or unknown

    def delete_rule(self) -> None:
        table = self.table
        if table is None or _RULE_CHAIN_ID in self.found:
            self.inexact()
            return
        chains = [self.text(_RULE_CHAIN)] if _RULE_CHAIN in self.found else list(table.chains)
        # Without a chain the kernel takes every rule of the table, whatever else is there.
        one = _RULE_CHAIN in self.found and (_RULE_HANDLE in self.found or _RULE_ID in self.found)
        for chain in chains:
            if chain not in table.chains:
                self.inexact()
            else:
                table.chains[chain] = max(0, table.chains[chain] - 1) if one else 0
