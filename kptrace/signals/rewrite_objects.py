# SPDX-License-Identifier: Apache-2.0
"""Sizes of the installed rules: an inventory kept up by batches, dumped anew, in slices, where they tell too little."""

import errno
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import structlog

from kptrace.dataplanes.iptables.entries import table_entries
from kptrace.dataplanes.iptables.legacy import table_names
from kptrace.dataplanes.nftables.dump import Interrupted, open_channel
from kptrace.dataplanes.nftables.netlink import NetlinkError
from kptrace.dataplanes.nftables.object_changes import apply_batch
from kptrace.dataplanes.nftables.object_dump import RulesetDump
from kptrace.dataplanes.nftables.objects import Inventory
from kptrace.kernel.netns import NetworkNamespace
from kptrace.model.netfilter import DataPlane, IpFamily
from kptrace.signals.rewrite_labels import FAMILIES, TableNames, dataplane
from kptrace.signals.rewrite_records import Transaction

#: Of one slice of a dump, and between two: the loop has other work.
SLICE_SECONDS = 0.002
PAUSE_SECONDS = 0.005
#: A dump may cost this share of a core, and comes at most this often.
COST_SHARE = 0.005
LEAST_SECONDS = 10.0
#: It comes at least so often where sets change by themselves.
SLOW_SECONDS = 300.0
#: After an interrupted dump; it gets longer with the cost of what was thrown away.
RETRY_SECONDS = 0.2

_PROC_NET = Path("/proc/thread-self/net")
Row = tuple[str, str, str, str]


class Later(Protocol):
    """The part of the loop that this needs."""

    def call_later(self, seconds: float, callback: Callable[[], None]) -> object:
        """Call once."""
        ...


class RulesetObjects:
    """Counts by (dataplane, family, table, object) in one network namespace. Only for the loop's thread.

    Attributes:
        dumps: how many dumps were taken over.
    """

    def __init__(
        self,
        netns: NetworkNamespace,
        later: Later,
        names: TableNames,
        *,
        exact_sequence: bool,
        least_seconds: float = LEAST_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Nothing is read before `tick`."""
        self._netns = netns
        self._later = later
        self._names = names
        self._exact_sequence = exact_sequence
        self._least = least_seconds
        self._clock = clock
        self._log = structlog.get_logger(signal="rewrite")
        self._channel: socket.socket | None = None
        self._open_channel()
        self._inventory: Inventory | None = None
        self._dumped_ns = (0, 0)
        self._entries: dict[tuple[IpFamily, str], int] = {}
        self._steps: Iterator[None] | None = None
        self._dump: RulesetDump | None = None
        self._cost = 0.0
        self._due = 0.0
        self._slow_due = 0.0
        self._closed = False
        self._rows: dict[Row, int] | None = None
        self.dumps = 0

    def _open_channel(self) -> None:
        """Open the socket, anew: the kernel goes on with a dump that was given up, and refuses others till its end."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        try:
            with self._netns.enter():
                self._channel = open_channel()
        except OSError as error:
            self._log.warning("no_nfnetlink", error=str(error))

    @property
    def exact(self) -> bool:
        """Whether every commit since the last dump was followed."""
        return self._inventory is not None and self._inventory.exact

    def base_chains(self, nfproto: int, table: str) -> frozenset[str] | None:
        """Names of a table's base chains; None if the table is unknown."""
        known = self._inventory.tables.get((nfproto, table)) if self._inventory else None
        return frozenset(known.base) if known else None

    def committed(self, transaction: Transaction, *, whole: bool) -> None:
        """Follow a committed batch; `whole` is whether its copy has all of it."""
        inventory = self._inventory
        if inventory is None or self._included(transaction, inventory):
            return
        self._rows = None
        if whole and self._follows(transaction, inventory):
            apply_batch(inventory, transaction.data)
        else:
            inventory.exact = False
        if self._exact_sequence:
            inventory.generation = transaction.sequence_end

    def _included(self, transaction: Transaction, inventory: Inventory) -> bool:
        if self._exact_sequence:
            return not 0 < (transaction.sequence_end - inventory.generation) & 0xFFFFFFFF < 1 << 31
        return transaction.end_ns <= self._dumped_ns[0]

    def _follows(self, transaction: Transaction, inventory: Inventory) -> bool:
        if self._exact_sequence:
            return transaction.sequence_end == (inventory.generation + 1) & 0xFFFFFFFF
        return transaction.begin_ns >= self._dumped_ns[1]

    def doubt(self) -> None:
        """Something was committed that nobody followed: dump again when it is time."""
        if self._inventory is not None:
            self._inventory.exact = False

    def replaced(self, family: IpFamily, table: str, entries: int) -> None:
        """Follow a legacy table's replacement."""
        self._entries[family, table] = entries
        self._rows = None

    def tick(self) -> None:
        """Begin a dump if one is due."""
        now = self._clock()
        if self._closed or self._steps is not None or now < self._due:
            return
        inventory = self._inventory
        if inventory is not None and inventory.exact and not (inventory.dynamic and now >= self._slow_due):
            return
        self._read_legacy()
        if self._channel is None:
            self._due = now + SLOW_SECONDS
            return
        self._dump = RulesetDump(self._channel)
        self._steps = iter(self._dump)
        self._cost = 0.0
        self._begin_ns = time.monotonic_ns()
        self._slice()

    def _slice(self) -> None:
        if self._closed or self._steps is None:
            return
        begin, ready = time.thread_time(), False
        try:
            while time.thread_time() - begin < SLICE_SECONDS:
                next(self._steps)
            self._later.call_later(PAUSE_SECONDS, self._slice)
            return
        except StopIteration:
            ready = True
        except Interrupted:
            self._log.debug("ruleset_dump_interrupted")
        except NetlinkError as error:
            self._log.warning("ruleset_dump_failed", error=str(error))
            if error.errno != errno.EINTR:
                self._cost += LEAST_SECONDS * COST_SHARE
        finally:
            self._cost += time.thread_time() - begin
        self._steps = None
        self._finish(ready=ready)

    def _finish(self, *, ready: bool) -> None:
        now = self._clock()
        self._rows = None
        if ready and self._dump is not None:
            self._inventory = self._dump.inventory
            self._dumped_ns = (self._begin_ns, time.monotonic_ns())
            self._due = now + max(self._least, self._cost / COST_SHARE)
            self._slow_due = now + SLOW_SECONDS
            self.dumps += 1
        else:
            self._due = now + max(RETRY_SECONDS, self._cost / (4 * COST_SHARE))
            self._open_channel()
        self._dump = None

    def _read_legacy(self) -> None:
        with self._netns.enter():
            self._entries = {
                (family, table): entries
                for family, tables in table_names(_PROC_NET).items()
                for table in tables
                if (entries := table_entries(family, table)) is not None
            }
        self._rows = None

    def rows(self) -> dict[Row, int]:
        """The present counts by (dataplane, family, table, object); not to be changed."""
        if self._rows is None:
            self._rows = self._count()
        return self._rows

    def _count(self) -> dict[Row, int]:
        found: dict[Row, int] = {}
        for (nfproto, table), objects in self._inventory.tables.items() if self._inventory else ():
            plane = dataplane(nfproto, table, objects.base)
            for thing, count in objects.counts().items():
                row = (plane.value, FAMILIES.get(nfproto, "other"), self._names.label(table), thing)
                found[row] = found.get(row, 0) + count
        for (family, table), entries in self._entries.items():
            row = (DataPlane.IPTABLES_LEGACY.value, family.value, self._names.label(table), "entry")
            found[row] = found.get(row, 0) + entries
        return found

    def close(self) -> None:
        """Close the socket. Idempotent."""
        self._closed = True
        self._steps = None
        if self._channel is not None:
            self._channel.close()
            self._channel = None
