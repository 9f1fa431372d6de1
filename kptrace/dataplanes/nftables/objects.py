# SPDX-License-Identifier: Apache-2.0
"""How many chains, rules, sets and elements each table of nf_tables has. Pure; object_changes.py feeds it.

A batch says `flush chain` without a number, and `add` of what exists already; so the inventory knows the names of
chains and sets, the number of each chain's rules and the keys of each set's elements. What a batch does not tell
(elements that packets add or that time out, objects deleted by handle) makes it inexact until the next dump. Anonymous
sets and chains belong to the rule that holds them and count as part of it, as in `nft list ruleset`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

#: Names and keys that are kept, over all tables; beyond, only dumps tell.
MAX_NAMES: Final = 65_536
MAX_ELEMENTS: Final = 131_072

TableKey = tuple[int, str]


@dataclass(slots=True)
class SetObjects:
    """One named set or map: hashes of its elements' keys, without the ends of intervals.

    `dynamic` sets change by packets and by time.
    """

    dynamic: bool = False
    keys: set[int] = field(default_factory=set)


@dataclass(slots=True)
class TableObjects:
    """One table: rules by chain, base chains' names, sets by name.

    An `owned` table is another process's alone: nobody else's flush takes it, and it is gone when its owner is.
    """

    chains: dict[str, int] = field(default_factory=dict)
    base: set[str] = field(default_factory=set)
    sets: dict[str, SetObjects] = field(default_factory=dict)
    owned: bool = False

    def counts(self) -> Mapping[str, int]:
        """Numbers by object."""
        return {
            "chain": len(self.chains),
            "rule": sum(self.chains.values()),
            "set": len(self.sets),
            "element": sum(len(each.keys) for each in self.sets.values()),
        }


class Inventory:
    """All tables of one network namespace at one generation.

    Attributes:
        generation: of the ruleset that it describes.
        exact: whether nothing happened that it could not follow.
        tables: by (nfproto, name).
    """

    def __init__(self, generation: int = 0) -> None:
        self.generation = generation
        self.exact = True
        self.tables: dict[TableKey, TableObjects] = {}
        self._names = 0
        self._elements = 0

    def room_for_name(self) -> bool:
        """Count one more table, chain or set, if there is room."""
        room = self._names < MAX_NAMES
        self._names += room
        self.exact &= room
        return room

    def room_for_element(self) -> bool:
        """Count one more element, if there is room."""
        room = self._elements < MAX_ELEMENTS
        self._elements += room
        self.exact &= room
        return room

    def drop_table(self, key: TableKey) -> None:
        """Forget a table and what is in it."""
        table = self.tables.pop(key, None)
        if table is not None:
            self._names -= 1 + len(table.chains) + len(table.sets)
            self._elements -= sum(len(each.keys) for each in table.sets.values())

    def drop_name(self) -> None:
        """Count one name less."""
        self._names -= 1

    def drop_elements(self, count: int) -> None:
        """Count elements less."""
        self._elements -= count

    @property
    def dynamic(self) -> bool:
        """Whether any set or table changes without a batch."""
        return any(
            table.owned or any(each.dynamic for each in table.sets.values()) for table in self.tables.values()
        )

    def named_sets(self) -> Iterator[tuple[int, str, str]]:
        """(nfproto, table, set) of every named set."""
        for (family, table), objects in self.tables.items():
            for name in objects.sets:
                yield family, table, name
