# SPDX-License-Identifier: Apache-2.0
"""The inventory of real maps of Cilium's, as many as on a large node: exact, bounded in cost, and off the scrape path."""

import errno
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from kptrace.dataplanes.cilium.detect import Detector
from kptrace.dataplanes.cilium.layouts import Role
from kptrace.experiments import cilium_entries
from kptrace.experiments.cilium_layouts import LAYOUTS, MapName, Version
from kptrace.experiments.cilium_maps import BpfFilesystem, CiliumMaps
from kptrace.kernel.host import Host
from kptrace.kernel.map_memory import map_memory
from kptrace.kernel.maps import Map
from kptrace.kernel.objects import map_info, open_map, set_pin
from kptrace.model.errors import KernelError
from kptrace.model.signal import State
from kptrace.signals import datapath_inventory_reader
from kptrace.signals.datapath_inventory_count import COST_SHARE
from kptrace.signals.datapath_inventory_reader import REST, InventoryReader
from tests.native import inventory_bench
from tests.native.inventory_bench import BACKENDS, SERVICES, Bench, count_packets, dumped, packets_of, until

_CPUS = Host().possible_cpus()
#: Pinned maps that are not read: they hold programs.
_PROGRAMS = {Role.CALL_POLICY.value}


@pytest.fixture
def bpffs() -> Iterator[Path]:
    """A BPF file system of the test's own."""
    with BpfFilesystem() as mounted:
        yield mounted.root


@pytest.fixture
def measure(bpffs: Path) -> Iterator[Callable[[], Bench]]:
    """Begin to read the test's maps; nothing of it stays."""
    before = descriptors()
    made: list[Bench] = []

    def start() -> Bench:
        made.append(Bench(bpffs))
        return made[-1]

    yield start
    for each in made:
        each.signal.close()
    assert descriptors() == before


def descriptors() -> int:
    """How many this process has."""
    return len(list(Path("/proc/self/fd").iterdir()))


def read_once(bench: Bench) -> None:
    """Wait until every map was read."""
    roles = bench.look() - _PROGRAMS
    assert until(lambda: roles <= bench.entries().keys()), roles - bench.entries().keys()


def test_ten_thousand_services_are_counted(bpffs: Path, measure: Callable[[], Bench]) -> None:
    """10,000 Services with 50,000 back ends: every figure is what was written, and what bpftool reads."""
    with CiliumMaps(bpffs) as maps:
        inventory_bench.fill(maps)
        bench = measure()
        read_once(bench)
        assert bench.values("kptrace_datapath_services") == {("ipv4",): SERVICES, ("ipv6",): 0}
        assert bench.values("kptrace_datapath_backends") == {("ipv4",): BACKENDS, ("ipv6",): 0}
        for name, role in ((MapName.SERVICES4, "lb4_services"), (MapName.BACKENDS4, "lb4_backends")):
            made = maps.maps[name]
            assert bench.entries()[role] == len(dumped(maps.pin(name)))
            assert bench.values("kptrace_bpf_map_max_entries")[role,] == made.spec.max_entries
            assert bench.values("kptrace_bpf_map_memory_bytes")[role,] == map_memory(made.fd)
        assert bench.entries()["lb4_services"] == SERVICES + BACKENDS + 2
        assert bench.values("kptrace_bpf_map_fill_ratio")["lb4_backends",] == pytest.approx(BACKENDS / 65536)
        assert set(bench.values("kptrace_bpf_map_partly_counted").values()) == {0}
        assert all(0 <= age < 60 for age in bench.values("kptrace_datapath_inventory_age_seconds").values())


def test_packets_by_reason_are_the_maps(bpffs: Path, measure: Callable[[], Bench]) -> None:
    """Packets and bytes of all CPUs, lines and files together, as bpftool reads them."""
    with CiliumMaps(bpffs) as maps:
        for line, (reason, direction, packets) in enumerate(
            ((0, 1, 101), (0, 2, 997), (133, 1, 7), (133, 1, 13), (181, 2, 3), (4, 1, 5))
        ):
            count_packets(maps, _CPUS, reason, direction, packets, line)
        bench = measure()
        read_once(bench)
        expected = packets_of(maps.pin(MapName.METRICS))
        assert expected[133, 1] == (20 * _CPUS, 2000 * _CPUS)
        ways = {1: "ingress", 2: "egress"}
        names = {
            0: ("forwarded", "Success"),
            4: ("noted", "Interface Decrypted"),
            133: ("dropped", "Policy denied"),
            181: ("dropped", "Policy denied by denylist"),
        }
        for position, name in enumerate(("kptrace_datapath_packets_total", "kptrace_datapath_bytes_total")):
            assert bench.values(name) == {
                (ways[direction], *names[reason], str(reason)): counts[position]
                for (reason, direction), counts in expected.items()
            }


def test_policies_of_all_endpoints_are_added(bpffs: Path, measure: Callable[[], Bench]) -> None:
    """Entries and room of all of them; the ratio is that of the fullest."""
    spec = LAYOUTS[Version.CURRENT][MapName.POLICY]
    with CiliumMaps(bpffs) as maps:
        own = [replace(spec, name=f"cilium_policy_v2_{n:05d}", max_entries=64) for n in (7, 8)]
        made = [Map(each) for each in own]
        for number, each in enumerate(made):
            set_pin(each.fd, bpffs / "tc/globals" / each.spec.name)
            for identity in range(16 * (number + 1)):
                each.update(*cilium_entries.allow_entry(12, 8, egress=False, identity=identity))
        # Somebody holds a replaced one: it is pinned no more.
        replaced = Map(replace(spec, name="cilium_policy_v2_00009"))
        replaced.update(*cilium_entries.allow_entry(12, 8, egress=False))
        maps.add_endpoint("10.0.0.7", 3, "10.0.0.0/24")
        bench = measure()
        read_once(bench)
        assert bench.entries()["policy"] == 16 + 32 + len(dumped(maps.pin(MapName.POLICY)))
        assert bench.values("kptrace_bpf_map_max_entries")["policy",] == 64 + 64 + spec.max_entries
        assert bench.values("kptrace_bpf_map_fill_ratio")["policy",] == 0.5
        for each in made:
            (bpffs / "tc/globals" / each.spec.name).unlink()
            each.close()
        replaced.close()


def test_an_unknown_layout_costs_its_own_figures_only(bpffs: Path, measure: Callable[[], Bench]) -> None:
    """No back ends are shown, everything else is, and the state names the map."""
    with CiliumMaps(bpffs, Version.UNKNOWN) as maps:
        inventory_bench.fill(maps, 10, 2)
        bench = measure()
        read_once(bench)
        assert bench.values("kptrace_datapath_services") == {("ipv4",): 10, ("ipv6",): 0}
        assert bench.entries()["lb4_services"] == len(dumped(maps.pin(MapName.SERVICES4)))
        (row,) = bench.signal.states()
        assert (row.state, row.reason) == (State.DEGRADED, "not_all_readable")
        assert "cilium_lb4_backends_v3 has keys of 4 and values of 16 bytes" in row.detail


def test_an_older_agents_maps_are_counted(bpffs: Path, measure: Callable[[], Bench]) -> None:
    """Back ends of the second version, policies in a hash."""
    with CiliumMaps(bpffs, Version.OLDER) as maps:
        inventory_bench.fill(maps, 10, 2)
        bench = measure()
        read_once(bench)
        assert bench.values("kptrace_datapath_services")["ipv4",] == 10
        assert bench.values("kptrace_datapath_backends")["ipv4",] == 20


def test_a_map_that_may_not_be_read_costs_its_own_figures_only(
    bpffs: Path, measure: Callable[[], Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel refuses it; the others are read, the state and a counter tell."""
    with CiliumMaps(bpffs) as maps:
        inventory_bench.fill(maps, 3, 2)
        refused = map_info(maps.maps[MapName.LXC].fd).id

        def open_all_but_one(identifier: int) -> int | None:
            # As a security module would: there is none on this machine.
            if identifier == refused:
                raise KernelError("bpf: EPERM (Operation not permitted)", errno=errno.EPERM)
            return open_map(identifier)

        monkeypatch.setattr(datapath_inventory_reader, "open_map", open_all_but_one)
        bench = measure()
        roles = bench.look() - _PROGRAMS - {"lxc"}
        assert until(lambda: roles <= bench.entries().keys() and bench.signal.inventory.failed > 0)
        assert "lxc" not in bench.entries()
        assert bench.values("kptrace_datapath_services")["ipv4",] == 3
        (row,) = bench.signal.states()
        assert (row.state, row.reason) == (State.DEGRADED, "not_all_readable")
        assert "lxc: bpf: EPERM" in row.detail
        assert bench.signal.losses() == {("datapath_inventory", "read_failed"): 1}


def test_maps_that_go_are_shown_no_more_but_totals_stay(bpffs: Path, measure: Callable[[], Bench]) -> None:
    """With the agent's maps their figures go; a new map of packet counts goes on from the old one's."""
    bench = measure()
    with CiliumMaps(bpffs) as maps:
        count_packets(maps, _CPUS, 133, 1, 7)
        read_once(bench)
    bench.look()
    assert until(lambda: "lb4_services" not in bench.entries())
    label = ("ingress", "dropped", "Policy denied", "133")
    assert bench.values("kptrace_datapath_packets_total") == {label: 7 * _CPUS}
    with CiliumMaps(bpffs) as maps:
        count_packets(maps, _CPUS, 133, 1, 2)
        read_once(bench)
        assert bench.values("kptrace_datapath_packets_total") == {label: 9 * _CPUS}


def test_counting_that_takes_too_long_is_given_up(
    bpffs: Path, measure: Callable[[], Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was counted by then is said to be a floor."""
    monkeypatch.setattr(datapath_inventory_reader, "MOST_SECONDS", 0.003)
    with CiliumMaps(bpffs) as maps:
        inventory_bench.fill(maps)
        bench = measure()
        read_once(bench)
        partly = bench.values("kptrace_bpf_map_partly_counted")
        assert partly["lb4_services",] == 1
        assert partly["lb6_services",] == 0
        assert 0 < bench.entries()["lb4_services"] < SERVICES + BACKENDS


def test_a_full_conntrack_map_is_counted_gently(bpffs: Path, measure: Callable[[], Bench]) -> None:
    """512k connections, as many as an agent's map holds by default: counted in well under a second of a core."""
    with CiliumMaps(bpffs) as maps:
        pin = maps.pin(MapName.CT4)
        pin.unlink()
        connections = Map(replace(LAYOUTS[Version.CURRENT][MapName.CT4], max_entries=524_288))
        set_pin(connections.fd, pin)
        for number in range(400_000):
            connections.update(struct.pack(">2IHHBB", number, 1, 80, 81, 6, 0), bytes(56))
        bench = measure()
        read_once(bench)
        # Each CPU keeps free entries of an LRU map to itself: some were thrown out before it was full.
        assert bench.entries()["ct4"] == len(list(connections.keys())) >= 390_000
        assert bench.values("kptrace_bpf_map_partly_counted")["ct4",] == 0
        connections.close()


def test_reading_keeps_within_its_share(bpffs: Path) -> None:
    """While it reads it rests most of the time; from then on it takes 0.5 % of a core at most, however often it may read."""
    with CiliumMaps(bpffs) as maps:
        inventory_bench.fill(maps)
        reader = InventoryReader(Host(bpffs=bpffs), least=5.0)
        seen = Detector(Host(bpffs=bpffs)).look()
        began = time.monotonic()
        reader.follow(seen)
        (thread,) = (each for each in threading.enumerate() if each.name == "kptrace-inventory")
        assert thread.ident is not None
        clock = time.pthread_getcpuclockid(thread.ident)
        wanted = {role for role in seen.maps if role.value not in _PROGRAMS and role is not Role.OTHER} - {
            Role.CALLS
        }
        assert until(lambda: wanted <= reader.inventory.maps.keys())
        first, took = time.clock_gettime(clock), time.monotonic() - began
        print(f"the first reading: {first * 1e3:.0f} ms of a core within {took * 1e3:.0f} ms")
        assert first < 1.5 * took / (1 + REST)
        time.sleep(20)
        share = (time.clock_gettime(clock) - first) / 20
        print(f"then {share:.3%} of a core")
        assert share <= 1.2 * COST_SHARE
        reader.close()
