# SPDX-License-Identifier: Apache-2.0
"""An inventory of the whole ruleset from a dump."""

import errno
from collections.abc import Iterator
from typing import Final

from kptrace.dataplanes.nftables.dump import DumpChannel, Interrupted, string
from kptrace.dataplanes.nftables.netlink import NftMessage
from kptrace.dataplanes.nftables.netlink_socket import DatagramSocket
from kptrace.dataplanes.nftables.object_changes import take_object
from kptrace.dataplanes.nftables.objects import Inventory

_TABLE_NAME, _SET_NAME = 1, 2
_KINDS: Final = (NftMessage.GETTABLE, NftMessage.GETCHAIN, NftMessage.GETRULE, NftMessage.GETSET)


class RulesetDump:
    """One reading of the whole ruleset.

    Iterating does it, a datagram a step; `inventory` is complete, and of one generation, when the iteration ends.
    """

    def __init__(self, channel: DatagramSocket) -> None:
        """Read through a socket that nobody else uses."""
        self._channel = DumpChannel(channel)
        self.inventory = Inventory()

    def __iter__(self) -> Iterator[None]:
        """Read on by one datagram a step.

        Raises:
            Interrupted: the ruleset changed.
            NetlinkError: the kernel refused.
        """
        self.inventory.generation = self._channel.generation()
        for kind in _KINDS:
            yield from self._channel.dump(kind, 0, b"", self._take)
        for family, table, name in list(self.inventory.named_sets()):
            names = string(_TABLE_NAME, table) + string(_SET_NAME, name)
            yield from self._channel.dump(NftMessage.GETSETELEM, family, names, self._take)
        if self._channel.generation() != self.inventory.generation:
            raise Interrupted("a commit came in between", errno=errno.EINTR)

    def _take(self, message: bytes) -> None:
        take_object(self.inventory, message)
