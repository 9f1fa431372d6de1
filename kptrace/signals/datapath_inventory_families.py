# SPDX-License-Identifier: Apache-2.0
"""The families of what is in Cilium's maps, from one reading of them. Pure."""

from collections.abc import Iterator, Mapping
from typing import Final

from kptrace.dataplanes.cilium.layouts import Role
from kptrace.dataplanes.cilium.reasons import direction_name, reason_name
from kptrace.dataplanes.cilium.service_state import MAPS
from kptrace.model.metrics import MetricFamily, MetricSpec, Sample
from kptrace.signals.datapath_inventory_count import Cause, Inventory, MapReading, Traffic, verdict

_OF_A_MAP: Final = ("map",)
_OF_TRAFFIC: Final = ("direction", "verdict", "reason", "code")
_WHEN: Final = " Counted now and then; kptrace_datapath_inventory_age_seconds says when."

ENTRIES: Final = MetricSpec(
    "kptrace_bpf_map_entries",
    "gauge",
    "Entries of a map of the BPF data plane, by what it is for; of those of which each endpoint has one (policy), in all of"
    " them. A map that changes meanwhile is counted as one pass over it sees it; a floor where"
    " kptrace_bpf_map_partly_counted is 1." + _WHEN,
    _OF_A_MAP,
)
ROOM: Final = MetricSpec(
    "kptrace_bpf_map_max_entries",
    "gauge",
    "How many entries there is room for in a map of the BPF data plane; of those of which each endpoint has one, in all of"
    " them together.",
    _OF_A_MAP,
)
FILL: Final = MetricSpec(
    "kptrace_bpf_map_fill_ratio",
    "gauge",
    "Entries of a map of the BPF data plane as a share of those that it has room for; of those of which each endpoint has"
    " one, that of the fullest. LRU maps (ct, affinity) evict before they are full, the others refuse writes once they are.",
    _OF_A_MAP,
)
PARTLY: Final = MetricSpec(
    "kptrace_bpf_map_partly_counted",
    "gauge",
    "1 where counting a map of the BPF data plane was given up, since it took a second of a core: it has more entries than"
    " kptrace_bpf_map_entries says.",
    _OF_A_MAP,
)
MEMORY: Final = MetricSpec(
    "kptrace_bpf_map_memory_bytes",
    "gauge",
    "Memory of a map of the BPF data plane as the kernel reckons it (memlock in fdinfo; before v6.4 what it would take if it"
    " were full); of those of which each endpoint has one, of all of them.",
    _OF_A_MAP,
)
SERVICES: Final = MetricSpec(
    "kptrace_datapath_services",
    "gauge",
    "Frontends in the data plane's service map: addresses with a port that are load-balanced. A port of a Kubernetes Service"
    " has one for its cluster IP, and one for each other address (node ports: each of the node's)." + _WHEN,
    ("family",),
)
BACKENDS: Final = MetricSpec(
    "kptrace_datapath_backends",
    "gauge",
    "Back ends in the data plane's map, each once however many services have it; terminating and quarantined ones count."
    + _WHEN,
    ("family",),
)
PACKETS: Final = MetricSpec(
    "kptrace_datapath_packets_total",
    "counter",
    "Packets as the BPF data plane counts them itself (cilium_metrics), since that map was made. A packet may be counted at"
    " several places on its way. Reason is the agent's name of the code; codes changed their meaning between versions, the"
    " names are those of 1.19. Verdict noted: events that are neither a forward nor a drop." + _WHEN,
    _OF_TRAFFIC,
)
BYTES: Final = MetricSpec(
    "kptrace_datapath_bytes_total",
    "counter",
    "Bytes of kptrace_datapath_packets_total.",
    _OF_TRAFFIC,
)
AGE: Final = MetricSpec(
    "kptrace_datapath_inventory_age_seconds",
    "gauge",
    "How long ago a map of the BPF data plane was read: 30 s and more, the larger the map the longer, so that all reading"
    " takes at most 0.5 % of one core.",
    _OF_A_MAP,
)
SPECS: Final = (ENTRIES, ROOM, FILL, PARTLY, MEMORY, SERVICES, BACKENDS, PACKETS, BYTES, AGE)


def families(inventory: Inventory, now_ns: int) -> Iterator[MetricFamily]:
    """All families of it.

    Args:
        inventory: what was read.
        now_ns: CLOCK_MONOTONIC.
    """
    maps = sorted(inventory.maps.items())
    yield _of_maps(ENTRIES, {role: float(each.entries) for role, each in maps})
    yield _of_maps(ROOM, {role: float(each.room) for role, each in maps})
    yield _of_maps(FILL, {role: each.fullest for role, each in maps})
    yield _of_maps(PARTLY, {role: float(not each.whole) for role, each in maps})
    yield _of_maps(MEMORY, {role: float(each.memory) for role, each in maps if each.memory is not None})
    yield from _services(inventory.maps)
    yield from _traffic(inventory.traffic)
    yield _of_maps(AGE, {role: max(0, now_ns - each.at_ns) / 1e9 for role, each in maps})


def _of_maps(spec: MetricSpec, values: Mapping[Role, float]) -> MetricFamily:
    return MetricFamily(spec, [Sample((role.value,), value) for role, value in values.items()])


def _services(maps: Mapping[Role, MapReading]) -> Iterator[MetricFamily]:
    frontends, backends = [], []
    for family, (services, ends) in MAPS.items():
        found = maps.get(services)
        if found is not None and found.frontends is not None:
            frontends.append(Sample((family.value,), float(found.frontends)))
        if ends in maps:
            backends.append(Sample((family.value,), float(maps[ends].entries)))
    yield MetricFamily(SERVICES, frontends)
    yield MetricFamily(BACKENDS, backends)


def _traffic(totals: Mapping[Cause, Traffic]) -> Iterator[MetricFamily]:
    packets, volume = [], []
    for cause, traffic in sorted(totals.items()):
        code = cause.reason
        labels = (direction_name(cause.direction), verdict(code), reason_name(code), str(code))
        packets.append(Sample(labels, float(traffic.packets)))
        volume.append(Sample(labels, float(traffic.bytes)))
    yield MetricFamily(PACKETS, packets)
    yield MetricFamily(BYTES, volume)
