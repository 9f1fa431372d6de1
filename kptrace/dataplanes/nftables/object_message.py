# SPDX-License-Identifier: Apache-2.0
"""One message of nf_tables about one table, beside the inventory that it changes. Pure."""

from dataclasses import dataclass

from kptrace.dataplanes.nftables.netlink import be32, text
from kptrace.dataplanes.nftables.objects import Inventory, TableObjects

_NLM_F_REQUEST = 0x1


@dataclass(slots=True)
class ObjectMessage:
    """A message that is being taken in.

    Attributes:
        inventory: what it changes.
        data: the buffer that it is in.
        found: offsets of its attributes' payloads there, by type.
        family: nfproto of its table.
        name: of its table, empty where it has none.
        flags: `nlmsg_flags`.
    """

    inventory: Inventory
    data: bytes
    found: dict[int, tuple[int, int]]
    family: int
    name: str
    flags: int

    def text(self, kind: int) -> str:
        """An attribute as a name; empty where it is missing."""
        return text(self.data, *self.found[kind]) if kind in self.found else ""

    def number(self, kind: int) -> int:
        """An attribute as a number; 0 where it is missing."""
        return be32(self.data, *self.found[kind]) if kind in self.found else 0

    @property
    def table(self) -> TableObjects | None:
        """Its table, if the inventory knows it."""
        return self.inventory.tables.get((self.family, self.name))

    def inexact(self) -> None:
        """It does not tell enough."""
        self.inventory.exact = False

    def is_dumped(self) -> bool:
        """Whether the message came from the kernel: requests have NLM_F_REQUEST."""
        return not self.flags & _NLM_F_REQUEST
