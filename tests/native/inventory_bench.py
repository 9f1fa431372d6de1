# SPDX-License-Identifier: Apache-2.0
"""Cilium's maps, filled as on a large node, and the inventory of them: what was written, and what is shown."""

import struct
import time
from collections.abc import Callable
from pathlib import Path

from kptrace.dataplanes.cilium.detect import Detector
from kptrace.experiments import cilium_entries as entries
from kptrace.experiments.cilium_layouts import MapName
from kptrace.experiments.cilium_maps import CiliumMaps
from kptrace.kernel.host import Host
from kptrace.kernel.maps import split_per_cpu
from kptrace.model.identity import Protocol, ServiceAddress
from kptrace.model.metrics import Sample
from kptrace.signals.datapath_inventory import DatapathInventory
from tests.native.objects_bench import bpftool

SERVICES, BACKENDS_EACH = 10_000, 5
BACKENDS = SERVICES * BACKENDS_EACH


def until(condition: Callable[[], bool], seconds: float = 60.0) -> bool:
    """Wait for a condition; whether it came true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def fill(maps: CiliumMaps, services: int = SERVICES, backends_each: int = BACKENDS_EACH) -> None:
    """IPv4 Services with back ends of their own, as an agent has them: back ends, then slots, then the master entry.

    The first Service has a second entry for traffic from inside, the second one an entry for all ports of its address.
    """
    frontends, backends = maps.maps[MapName.SERVICES4], maps.maps[MapName.BACKENDS4]
    size = backends.spec.value_size
    for number in range(services):
        address = ServiceAddress(f"10.96.{number >> 8}.{number & 255}", 80, Protocol.TCP)
        for slot in range(1, backends_each + 1):
            backend = number * backends_each + slot
            ip = f"10.{128 + (backend >> 16)}.{backend >> 8 & 255}.{backend & 255}"
            backends.update(entries.backend_key(backend), entries.backend_value(ip, 8080, 6, 0, size))
            frontends.update(
                entries.service_key(address, slot, protocol=True),
                entries.service_value(number + 1, backend=backend),
            )
        master = entries.service_key(address, 0, protocol=True)
        frontends.update(master, entries.service_value(number + 1, count=backends_each))
        if number == 0:
            inside = master[:9] + b"\x01" + master[10:]
            frontends.update(inside, entries.service_value(number + 1, count=backends_each))
        elif number == 1:
            frontends.update(master[:4] + bytes(8), entries.service_value(0))


def count_packets(
    maps: CiliumMaps, cpus: int, reason: int, direction: int, packets: int, line: int = 0
) -> None:
    """Write an entry of `cilium_metrics`: each CPU has counted `packets`, of 100 bytes each."""
    key = struct.pack("<BBHB3x", reason, direction, line, 1)
    maps.maps[MapName.METRICS].update(key, struct.pack("<2Q", packets, 100 * packets) * cpus)


def dumped(path: Path) -> list[tuple[bytes, bytes]]:
    """What bpftool reads of a pinned map; of a per-CPU map all CPUs' values, one behind the other."""

    def data(words: list[str]) -> bytes:
        return bytes(int(word, 16) for word in words)

    return [
        (
            data(each["key"]),
            data(each["value"])
            if "value" in each
            else b"".join(data(one["value"]) for one in each["values"]),
        )
        for each in bpftool("map", "dump", "pinned", path)
    ]


def packets_of(path: Path) -> dict[tuple[int, int], tuple[int, int]]:
    """Packets and bytes by reason and direction, as bpftool reads them from `cilium_metrics`."""
    found: dict[tuple[int, int], tuple[int, int]] = {}
    for key, values in dumped(path):
        parts = [struct.unpack("<2Q", part) for part in split_per_cpu(values, 16)]
        before = found.get((key[0], key[1]), (0, 0))
        found[key[0], key[1]] = before[0] + sum(p for p, _ in parts), before[1] + sum(b for _, b in parts)
    return found


class Bench:
    """The signal on the maps in one BPF file system."""

    def __init__(self, root: Path) -> None:
        self._detector = Detector(Host(bpffs=root))
        self.signal = DatapathInventory(Host(bpffs=root))

    def look(self) -> set[str]:
        """See what is there now; the roles of pinned maps."""
        seen = self._detector.look()
        self.signal.seen(seen)
        return {role.value for role, found in seen.maps.items() if found[0].pin is not None}

    def values(self, name: str) -> dict[tuple[str, ...], float]:
        """Samples of a metric by their labels."""
        return {
            sample.labels: sample.value
            for family in self.signal.families()
            if family.spec.name == name
            for sample in family.samples
            if isinstance(sample, Sample)
        }

    def entries(self) -> dict[str, float]:
        """Entries by map."""
        return {labels[0]: value for labels, value in self.values("kptrace_bpf_map_entries").items()}
