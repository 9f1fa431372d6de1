# SPDX-License-Identifier: Apache-2.0
"""Reads Cilium's maps now and then, in a thread of its own that rests most of the time.

Nothing of what it reads is kept but counts. Each map has a period of its own by what reading it costs.
"""

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Final

import structlog

from kptrace.dataplanes.cilium.detect import Datapath, FoundMap
from kptrace.dataplanes.cilium.layouts import Layout, Role
from kptrace.dataplanes.cilium.service_state import FAMILY_OF
from kptrace.kernel.foreign_map import ForeignMap
from kptrace.kernel.host import Host
from kptrace.kernel.map_memory import map_memory
from kptrace.kernel.objects import open_map
from kptrace.model.errors import KernelError
from kptrace.signals.datapath_inventory_count import (
    LEAST_SECONDS,
    Inventory,
    MapReading,
    TrafficTotals,
    frontend_test,
    periods,
    read_traffic,
)

#: After so much of a core's time, a rest that is so many times as long.
SLICE_SECONDS: Final = 0.002
REST: Final = 4
#: No map is read for longer than this, seconds of a core; what was counted by then is there at least.
MOST_SECONDS: Final = 1.0
#: Between two looks for what is due, as a share of the shortest period.
TOGETHER: Final = 0.1
_CHUNK: Final = 256
#: Not maps of entries, but of programs, or nothing that is known.
NOT_READ: Final = frozenset({Role.CALLS, Role.CALL_POLICY, Role.OTHER})
_SERVICES: Final = frozenset({Role.LB4_SERVICES, Role.LB6_SERVICES}) & FAMILY_OF.keys()


class _ClosingError(Exception):
    """The thread is to end."""


class _Pace:
    """Lets a reading rest, and tells when it has taken long enough.

    Attributes:
        whole: whether it was never told to end.
    """

    def __init__(self, closing: threading.Event, clock: Callable[[], float] = time.thread_time) -> None:
        self._closing = closing
        self._clock = clock
        self._begin = self._rested = clock()
        self.whole = True

    @property
    def cost(self) -> float:
        """Seconds of a core until now."""
        return self._clock() - self._begin

    def go_on(self) -> bool:
        """Rest if it is time to; whether there is time for more."""
        now = self._clock()
        if now - self._rested >= SLICE_SECONDS:
            if self._closing.wait(REST * (now - self._rested)):
                raise _ClosingError
            self._rested = self._clock()
        self.whole = now - self._begin < MOST_SECONDS
        return self.whole


class InventoryReader:
    """`follow` and `close` are for one thread; `inventory` is for any."""

    def __init__(
        self, host: Host, clock: Callable[[], int] = time.monotonic_ns, least: float = LEAST_SECONDS
    ) -> None:
        """Nothing is read, and no thread is there, before there is something to read.

        Args:
            host: what tells how many CPUs there are.
            clock: CLOCK_MONOTONIC, ns.
            least: seconds between two readings of one map.
        """
        self._least = least
        self._host = host
        self._clock = clock
        self._log = structlog.get_logger(signal="datapath_inventory")
        self._closing = threading.Event()
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kptrace-inventory", daemon=True)
        self._wanted: Mapping[Role, tuple[FoundMap, ...]] = {}
        self._costs: dict[Role, float] = {}
        self._read_at: dict[Role, float] = {}
        self._traffic = TrafficTotals()
        self.inventory = Inventory()

    def follow(self, seen: Datapath) -> None:
        """What is there now."""
        self._wanted = {
            role: _to_read(found) for role, found in seen.maps.items() if found and role not in NOT_READ
        }
        if self._wanted and self._thread.ident is None and not self._closing.is_set():
            self._thread.start()
        self._wake.set()

    def close(self) -> None:
        """End the thread. Idempotent."""
        self._closing.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while True:
            # Cleared before looking, while `close` sets in the other order: neither can miss the other.
            self._wake.clear()
            if self._closing.is_set():
                return
            try:
                wait = self._round()
            except _ClosingError:
                return
            # Without anything to read it waits for that to come.
            self._wake.wait(wait if self._wanted else None)

    def _round(self) -> float:
        """Read what is due; seconds until something will be."""
        wanted = self._wanted
        self._forget(wanted)
        due = self._due()
        for role, found in wanted.items():
            if due.get(role, 0.0) <= 0:
                self._read(role, found)
        # Not at once: what is due a little later is then read too.
        return max(TOGETHER * self._least, min(self._due().values(), default=0.0))

    def _due(self) -> dict[Role, float]:
        """In how many seconds each map that was read is to be read again."""
        now = self._clock() / 1e9
        waits = periods(self._costs, self._least)
        return {role: at + waits[role] - now for role, at in self._read_at.items()}

    def _forget(self, wanted: Mapping[Role, object]) -> None:
        for known in (self._costs, self._read_at):
            for role in known.keys() - wanted.keys():
                del known[role]
        before = self.inventory
        gone = (before.maps.keys() | before.troubles.keys()) - wanted.keys()
        for role in gone:
            self._publish(role, None, "")

    def _read(self, role: Role, found: Iterable[FoundMap]) -> None:
        pace = _Pace(self._closing)
        reading, trouble = None, ""
        try:
            reading = self._read_maps(role, found, pace)
        except (KernelError, OSError, ValueError) as error:
            trouble = f"{role}: {error}"
            if role not in self.inventory.troubles:
                self._log.warning("map_not_read", map=role.value, detail=str(error))
        self._costs[role] = pace.cost
        self._read_at[role] = self._clock() / 1e9
        self._publish(role, reading, trouble)

    def _publish(self, role: Role, reading: MapReading | None, trouble: str) -> None:
        before = self.inventory
        maps = {known: value for known, value in before.maps.items() if known is not role}
        troubles = {known: text for known, text in before.troubles.items() if known is not role}
        if reading is not None:
            maps[role] = reading
        if trouble:
            troubles[role] = trouble
        self.inventory = Inventory(maps, self._traffic.totals, troubles, before.failed + bool(trouble))

    def _read_maps(self, role: Role, found: Iterable[FoundMap], pace: _Pace) -> MapReading | None:
        """None where all of them are gone."""
        total, cpus = MapReading(), self._host.possible_cpus()
        for each in found:
            fd = open_map(each.info.id)
            if fd is None:
                continue
            try:
                map_ = ForeignMap(fd, each.info, cpus)
            except BaseException:
                os.close(fd)
                raise
            try:
                total = self._read_map(role, each.layout, map_, map_memory(fd), total, pace)
            finally:
                map_.close()
        return replace(total, at_ns=self._clock()) if total.maps else None

    def _read_map(
        self,
        role: Role,
        layout: Layout,
        map_: ForeignMap,
        memory: int | None,
        total: MapReading,
        pace: _Pace,
    ) -> MapReading:
        room = map_.info.max_entries
        if role is Role.METRICS:
            traffic = {key: read_traffic(layout, key, value) for key, value in _entries(map_, pace)}
            self._traffic.take(map_.info.id, traffic, whole=pace.whole)
            return total.plus_map(len(traffic), room, memory, whole=pace.whole)
        count, frontends = 0, None
        if role in _SERVICES:
            frontends, test = total.frontends or 0, frontend_test(layout)
            for key, _ in _entries(map_, pace):
                count += 1
                frontends += test(key)
        else:
            for more in map_.counts():
                count += more
                if not pace.go_on():
                    break
        return replace(total.plus_map(count, room, memory, whole=pace.whole), frontends=frontends)


def _to_read(found: tuple[FoundMap, ...]) -> tuple[FoundMap, ...]:
    """The one to read; where each endpoint has its own, all that are as this one is: pinned, or not to be seen as such."""
    first = found[0]
    if not first.layout.many:
        return (first,)
    return tuple(each for each in found if (each.pin is None) == (first.pin is None))


def _entries(map_: ForeignMap, pace: _Pace) -> Iterator[tuple[bytes, bytes]]:
    """Entries of the map, with rests; not all of them if that takes too long."""
    for number, entry in enumerate(map_.read(2 * map_.info.max_entries), 1):
        yield entry
        if number % _CHUNK == 0 and not pace.go_on():
            return
