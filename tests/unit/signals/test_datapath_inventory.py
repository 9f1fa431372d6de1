# SPDX-License-Identifier: Apache-2.0
"""What is counted of Cilium's maps, and how it is shown, from bytes that are made here."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kptrace.dataplanes.cilium.layout_table import LAYOUTS
from kptrace.dataplanes.cilium.layouts import Layout, Role
from kptrace.dataplanes.cilium.service_map import ServiceKey, encode_service_key
from kptrace.model.metrics import Sample
from kptrace.signals.datapath_inventory import DatapathInventory
from kptrace.signals.datapath_inventory_count import (
    Cause,
    Inventory,
    MapReading,
    Traffic,
    TrafficTotals,
    frontend_test,
    periods,
    read_traffic,
    verdict,
)
from kptrace.signals.datapath_inventory_families import SPECS, families

SECOND = 1_000_000_000


def layout(role: Role) -> Layout:
    """The newest layout of a map."""
    return max((each for each in LAYOUTS if each.role is role), key=lambda each: each.generation)


@pytest.mark.parametrize(
    ("key", "counts"),
    [
        (ServiceKey("10.0.0.1", 80, 6), True),
        (ServiceKey("10.0.0.1", 80, 0), True),
        (ServiceKey("0.0.0.0", 30080, 6), True),
        (ServiceKey("10.0.0.1", 80, 6, slot=1), False),
        (ServiceKey("10.0.0.1", 80, 6, slot=256), False),
        (ServiceKey("10.0.0.1", 80, 6, scope=1), False),
        (ServiceKey("10.0.0.1", 0, 0), False),
        (ServiceKey("10.0.0.1", 256, 6), True),
    ],
)
def test_only_master_entries_are_frontends(key: ServiceKey, *, counts: bool) -> None:
    """Slots, the second scope and the entry for all ports of an address are none, in both families."""
    for role, ip in ((Role.LB4_SERVICES, key.ip), (Role.LB6_SERVICES, "fd00::1")):
        found = layout(role)
        data = encode_service_key(found, key._replace(ip=ip))
        assert frontend_test(found)(data) is counts


def test_an_entry_of_the_metrics_map_is_of_all_cpus() -> None:
    """The CPUs' packets and bytes are added; of the direction's byte two bits count, line and file do not."""
    key = struct.pack("<BBHB3x", 133, 0x80 | 2, 711, 9)
    value = struct.pack("<4Q", 5, 500, 7, 0)
    assert read_traffic(layout(Role.METRICS), key, value) == (Cause(133, 2), Traffic(12, 500))


def entry(packets: int, reason: int = 133, direction: int = 1) -> tuple[Cause, Traffic]:
    """What one entry holds, 100 bytes a packet."""
    return Cause(reason, direction), Traffic(packets, 100 * packets)


def test_entries_of_one_reason_are_added() -> None:
    """Lines and files are not told apart, reasons and directions are."""
    totals = TrafficTotals()
    totals.take(1, {b"a": entry(5), b"b": entry(7), b"c": entry(1, direction=2)})
    assert totals.totals == {Cause(133, 1): Traffic(12, 1200), Cause(133, 2): Traffic(1, 100)}


def test_totals_survive_entries_and_maps() -> None:
    """An entry that vanishes, comes back from zero, or a whole new map: nothing that was counted is lost or counted twice."""
    totals = TrafficTotals()
    totals.take(1, {b"a": entry(5), b"b": entry(7)})
    totals.take(1, {b"b": entry(8)})
    assert totals.totals[Cause(133, 1)].packets == 13
    totals.take(1, {b"a": entry(2), b"b": entry(9)})
    assert totals.totals[Cause(133, 1)].packets == 16
    totals.take(1, {})
    totals.take(1, {b"b": entry(9)})
    assert totals.totals[Cause(133, 1)].packets == 25
    totals.take(2, {b"a": entry(3), b"b": entry(30)})
    assert totals.totals[Cause(133, 1)].packets == 58


def test_a_partial_reading_counts_nothing_twice() -> None:
    """What was not read this time goes on from what it was."""
    totals = TrafficTotals()
    totals.take(1, {b"a": entry(5), b"b": entry(7)})
    totals.take(1, {b"b": entry(8)}, whole=False)
    totals.take(1, {b"a": entry(6), b"b": entry(8)})
    assert totals.totals[Cause(133, 1)].packets == 14


@given(
    st.lists(
        st.tuples(
            st.integers(1, 2), st.dictionaries(st.sampled_from(b"abc"), st.integers(0, 1000)), st.booleans()
        )
    )
)
def test_totals_never_fall(readings: list[tuple[int, dict[int, int], bool]]) -> None:
    """Whatever is read, in whatever order."""
    totals, before = TrafficTotals(), Traffic()
    for map_id, found, whole in readings:
        totals.take(map_id, {bytes((key,)): entry(packets) for key, packets in found.items()}, whole=whole)
        now = totals.totals.get(Cause(133, 1), Traffic())
        assert now.packets >= before.packets
        assert now.bytes >= before.bytes
        before = now


@given(st.dictionaries(st.integers(), st.floats(0, 10), max_size=25))
def test_all_readings_together_keep_within_their_share(costs: dict[int, float]) -> None:
    """No map is read more often than every 30 s, and all of them take 0.5 % of a core at most."""
    found = periods(costs)
    assert found.keys() == costs.keys()
    assert all(period >= 30 for period in found.values())
    assert sum(cost / found[name] for name, cost in costs.items()) <= 0.005 * (1 + 1e-9)


def test_small_maps_do_not_wait_for_large_ones() -> None:
    """Small ones are read every 30 s; the large ones have what is left in equal parts."""
    found = periods({"small": 0.001, "large": 0.3, "huge": 0.9})
    assert found["small"] == 30
    left = (0.005 - 0.001 / 30) / 2
    assert found == {"small": 30, "large": pytest.approx(0.3 / left), "huge": pytest.approx(0.9 / left)}


def test_maps_of_one_role_are_one_reading() -> None:
    """Their entries are added; the fullest one is told, memory where any tells it, and whether any was cut short."""
    found = MapReading().plus_map(3, 4, None, whole=True)
    found = found.plus_map(10, 100, 4096, whole=False).plus_map(0, 100, 8192, whole=True)
    assert found == MapReading(13, 204, 0.75, whole=False, memory=12288, maps=3)


@pytest.mark.parametrize(
    ("code", "said"), [(0, "forwarded"), (3, "noted"), (15, "noted"), (130, "dropped"), (255, "dropped")]
)
def test_verdicts(code: int, said: str) -> None:
    """0 is a forward, from 130 on they are drops, what is between is neither."""
    assert verdict(code) == said


def test_an_inventory_becomes_metrics() -> None:
    """Every family, with names of reasons beside their codes."""
    maps = {
        Role.LB4_SERVICES: MapReading(60, 100, 0.6, memory=4096, maps=1, frontends=10, at_ns=5 * SECOND),
        Role.LB4_BACKENDS: MapReading(50, 100, 0.5, maps=1, at_ns=6 * SECOND),
        Role.CT4: MapReading(99, 1000, 0.099, whole=False, maps=1, at_ns=2 * SECOND),
    }
    traffic = {Cause(0, 2): Traffic(7, 700), Cause(133, 1): Traffic(2, 200), Cause(250, 0): Traffic(1, 1)}
    found = {family.spec: family.samples for family in families(Inventory(maps, traffic), 65 * SECOND)}
    values = {
        (spec.name.removeprefix("kptrace_"), *sample.labels): sample.value
        for spec, samples in found.items()
        for sample in samples
        if isinstance(sample, Sample)
    }
    assert set(found) == set(SPECS)
    assert values == {
        ("bpf_map_entries", "lb4_services"): 60,
        ("bpf_map_entries", "lb4_backends"): 50,
        ("bpf_map_entries", "ct4"): 99,
        ("bpf_map_max_entries", "lb4_services"): 100,
        ("bpf_map_max_entries", "lb4_backends"): 100,
        ("bpf_map_max_entries", "ct4"): 1000,
        ("bpf_map_fill_ratio", "lb4_services"): 0.6,
        ("bpf_map_fill_ratio", "lb4_backends"): 0.5,
        ("bpf_map_fill_ratio", "ct4"): 0.099,
        ("bpf_map_partly_counted", "lb4_services"): 0,
        ("bpf_map_partly_counted", "lb4_backends"): 0,
        ("bpf_map_partly_counted", "ct4"): 1,
        ("bpf_map_memory_bytes", "lb4_services"): 4096,
        ("datapath_services", "ipv4"): 10,
        ("datapath_backends", "ipv4"): 50,
        ("datapath_packets_total", "egress", "forwarded", "Success", "0"): 7,
        ("datapath_packets_total", "ingress", "dropped", "Policy denied", "133"): 2,
        ("datapath_packets_total", "unknown", "dropped", "250", "250"): 1,
        ("datapath_bytes_total", "egress", "forwarded", "Success", "0"): 700,
        ("datapath_bytes_total", "ingress", "dropped", "Policy denied", "133"): 200,
        ("datapath_bytes_total", "unknown", "dropped", "250", "250"): 1,
        ("datapath_inventory_age_seconds", "lb4_services"): 60,
        ("datapath_inventory_age_seconds", "lb4_backends"): 59,
        ("datapath_inventory_age_seconds", "ct4"): 63,
    }


def test_where_cilium_is_not_nothing_runs() -> None:
    """No sample, no thread, and a state that says so."""
    signal = DatapathInventory()
    assert [family for family in signal.families() if family.samples] == []
    assert [family.spec for family in signal.families()] == list(signal.describe())
    (row,) = signal.states()
    assert (row.state, row.reason) == ("off", "absent")
    assert signal.status(names=True) == {}
    assert signal.losses() == {("datapath_inventory", "read_failed"): 0}
    signal.close()
