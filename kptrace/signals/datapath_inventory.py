# SPDX-License-Identifier: Apache-2.0
"""The inventory signal: how much is in Cilium's maps, and what its datapath counts of packets."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

from kptrace.dataplanes.cilium.detect import Datapath
from kptrace.kernel.host import Host
from kptrace.model.metrics import MetricFamily, MetricSpec
from kptrace.model.netfilter import DataPlane
from kptrace.model.signal import MechanismState, State
from kptrace.signals.datapath import NOTHING
from kptrace.signals.datapath_inventory_count import Inventory
from kptrace.signals.datapath_inventory_families import SPECS, families
from kptrace.signals.datapath_inventory_reader import InventoryReader

_MECHANISM: Final = "map_read"


class DatapathInventory:
    """Implements `kptrace.model.signal.Source`: a scrape shows what the reader found last, and reads nothing itself."""

    name = "datapath_inventory"

    def __init__(self, host: Host = Host(), clock: Callable[[], int] = time.monotonic_ns) -> None:
        """Nothing is read before something is seen.

        Args:
            host: of the node.
            clock: CLOCK_MONOTONIC, ns.
        """
        self._clock = clock
        self._reader = InventoryReader(host, clock)
        self._seen = NOTHING

    @property
    def inventory(self) -> Inventory:
        """What was found last."""
        return self._reader.inventory

    def seen(self, datapath: Datapath) -> None:
        """What of Cilium is there now: a listener of the datapath signal."""
        self._seen = datapath
        self._reader.follow(datapath)

    def close(self) -> None:
        """Read no more. Idempotent."""
        self._reader.close()

    def losses(self) -> Mapping[tuple[str, str], int]:
        """Readings of a map that failed: they are done again."""
        return {(self.name, "read_failed"): self.inventory.failed}

    def status(self, *, names: bool) -> Mapping[str, object]:
        """What /status shows of it."""
        now = self._clock()
        rows = [
            {
                "map": role.value,
                "maps": each.maps,
                "entries": each.entries if each.whole else f"at least {each.entries}",
                "room": each.room,
                "fullest": f"{each.fullest:.1%}",
                "bytes": "not told" if each.memory is None else each.memory,
                "seconds ago": round((now - each.at_ns) / 1e9),
            }
            for role, each in sorted(self.inventory.maps.items())
        ]
        return {"datapath inventory": rows} if rows else {}

    def describe(self) -> Sequence[MetricSpec]:
        """See `Source`."""
        return SPECS

    def families(self) -> Iterable[MetricFamily]:
        """See `Source`."""
        return families(self.inventory, self._clock())

    def states(self) -> Sequence[MechanismState]:
        """See `Source`."""
        seen, inventory = self._seen, self.inventory
        if not seen.present:
            detail = f"nothing of {DataPlane.CILIUM} is in the kernel"
            return [MechanismState(self.name, _MECHANISM, State.OFF, "absent", detail)]
        # What has no layout that is known is not read either; the datapath signal found that out.
        troubles = [*inventory.troubles.values(), *seen.problems]
        if troubles:
            detail = "; ".join(troubles)
            return [MechanismState(self.name, _MECHANISM, State.DEGRADED, "not_all_readable", detail)]
        if not inventory.maps:
            return [MechanismState(self.name, _MECHANISM, State.DEGRADED, "starting", "not read yet")]
        return [MechanismState(self.name, _MECHANISM, State.ACTIVE)]
