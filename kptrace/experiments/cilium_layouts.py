# SPDX-License-Identifier: Apache-2.0
"""Names and sizes of the maps of Cilium's agents, as their sources have them: what the experiments' agent makes. Pure.

Not shared with what reads maps (`kptrace.dataplanes.cilium`): two tellings of the same sources check each other.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from types import MappingProxyType
from typing import Final

from kptrace.kernel.maps import MapSpec, MapType

#: Under the root of the BPF file system.
GLOBALS: Final = "tc/globals"
#: The container behind the datapath's programs, as the agent numbers it.
ENDPOINT: Final = 42
_NO_PREALLOC: Final = 1
_NO_COMMON_LRU: Final = 2
#: Entries of the maps of Services and back ends: as the agent's flag --bpf-lb-map-max has it by default.
SERVICES: Final = 65536
#: Smaller than on a node: these are allocated at once.
_CONNECTIONS: Final = 16384


class Version(StrEnum):
    """Whose maps they are.

    `CURRENT` is that of 1.17 to 1.19, `LEGACY` of 1.16, `OLDER` of 1.12, and `UNKNOWN` none of any agent: its back ends have
    sizes, and in IPv6 a name, that nobody has seen.
    """

    CURRENT = "current"
    LEGACY = "legacy"
    OLDER = "older"
    UNKNOWN = "unknown"


class MapName(StrEnum):
    """What a map is for, by the name that it has in current agents.

    In bpf/*_fixture.bpf.c they are called `services4` and so on, so that the maps that a compiler makes are not taken for
    an agent's.
    """

    SERVICES4 = "cilium_lb4_services_v2"
    SERVICES6 = "cilium_lb6_services_v2"
    BACKENDS4 = "cilium_lb4_backends_v3"
    BACKENDS6 = "cilium_lb6_backends_v3"
    REVERSE_NAT4 = "cilium_lb4_reverse_nat"
    REVERSE_NAT6 = "cilium_lb6_reverse_nat"
    AFFINITY_MATCH = "cilium_lb_affinity_match"
    AFFINITY4 = "cilium_lb4_affinity"
    SOURCE_RANGE4 = "cilium_lb4_source_range"
    SOCKETS4 = "cilium_lb4_reverse_sk"
    SOCKETS6 = "cilium_lb6_reverse_sk"
    CT4 = "cilium_ct4_global"
    CT_ANY4 = "cilium_ct_any4_global"
    CT6 = "cilium_ct6_global"
    CT_ANY6 = "cilium_ct_any6_global"
    POLICY = "cilium_policy_v2_00042"
    POLICY_STATISTICS = "cilium_policystats"
    IPCACHE = "cilium_ipcache_v2"
    LXC = "cilium_lxc"
    METRICS = "cilium_metrics"
    CALL_POLICY = "cilium_call_policy"


def _hash(name: MapName, key: int, value: int, entries: int = SERVICES) -> MapSpec:
    return MapSpec(name, MapType.HASH, key, value, entries, _NO_PREALLOC)


def _lru(name: MapName, key: int, value: int) -> MapSpec:
    return MapSpec(name, MapType.LRU_HASH, key, value, _CONNECTIONS)


def _trie(name: MapName, key: int, value: int, entries: int = _CONNECTIONS) -> MapSpec:
    return MapSpec(name, MapType.LPM_TRIE, key, value, entries, _NO_PREALLOC)


_CURRENT: Final = (
    _hash(MapName.SERVICES4, 12, 12),
    _hash(MapName.SERVICES6, 24, 12),
    _hash(MapName.BACKENDS4, 4, 12),
    _hash(MapName.BACKENDS6, 4, 24),
    _hash(MapName.REVERSE_NAT4, 2, 6),
    _hash(MapName.REVERSE_NAT6, 2, 18),
    _hash(MapName.AFFINITY_MATCH, 8, 1),
    _lru(MapName.AFFINITY4, 16, 16),
    _trie(MapName.SOURCE_RANGE4, 12, 1),
    _lru(MapName.SOCKETS4, 16, 8),
    _lru(MapName.SOCKETS6, 32, 20),
    _lru(MapName.CT4, 14, 56),
    _lru(MapName.CT_ANY4, 14, 56),
    _lru(MapName.CT6, 38, 56),
    _lru(MapName.CT_ANY6, 38, 56),
    _trie(MapName.POLICY, 12, 8),
    MapSpec(MapName.POLICY_STATISTICS, MapType.LRU_PERCPU_HASH, 12, 16, _CONNECTIONS, _NO_COMMON_LRU),
    _trie(MapName.IPCACHE, 24, 24, 512000),
    _hash(MapName.LXC, 20, 48, 65535),
    MapSpec(MapName.METRICS, MapType.PERCPU_HASH, 8, 16, 1024),
    MapSpec(MapName.CALL_POLICY, MapType.PROG_ARRAY, 4, 4, 65535),
)


def _changed(changes: Mapping[MapName, MapSpec | None]) -> Mapping[MapName, MapSpec]:
    made: dict[MapName, MapSpec] = {}
    for spec in _CURRENT:
        name = MapName(spec.name)
        after = changes.get(name, spec)
        if after is not None:
            made[name] = after
    return MappingProxyType(made)


def _spec(name: MapName) -> MapSpec:
    return next(spec for spec in _CURRENT if spec.name == name)


#: What an agent of each version makes, by what it is for.
LAYOUTS: Final[Mapping[Version, Mapping[MapName, MapSpec]]] = MappingProxyType(
    {
        Version.CURRENT: _changed({}),
        Version.LEGACY: _changed(
            {
                MapName.POLICY: replace(_spec(MapName.POLICY), name="cilium_policy_00042", value_size=24),
                MapName.POLICY_STATISTICS: None,
                MapName.IPCACHE: replace(_spec(MapName.IPCACHE), name="cilium_ipcache", value_size=12),
            }
        ),
        Version.OLDER: _changed(
            {
                MapName.BACKENDS4: replace(
                    _spec(MapName.BACKENDS4), name="cilium_lb4_backends_v2", value_size=8
                ),
                MapName.BACKENDS6: replace(
                    _spec(MapName.BACKENDS6), name="cilium_lb6_backends_v2", value_size=20
                ),
                MapName.POLICY: MapSpec("cilium_policy_00042", MapType.HASH, 8, 24, 16384, _NO_PREALLOC),
                MapName.POLICY_STATISTICS: None,
                MapName.IPCACHE: replace(_spec(MapName.IPCACHE), name="cilium_ipcache", value_size=12),
            }
        ),
        Version.UNKNOWN: _changed(
            {
                MapName.BACKENDS4: replace(_spec(MapName.BACKENDS4), value_size=16),
                MapName.BACKENDS6: replace(
                    _spec(MapName.BACKENDS6), name="cilium_lb6_backends_v4", value_size=32
                ),
                MapName.POLICY: replace(_spec(MapName.POLICY), name="cilium_policy_v3_00042", key_size=16),
            }
        ),
    }
)


#: Those that the flag is about.
LOAD_BALANCING: Final = frozenset(
    {
        *(MapName.SERVICES4, MapName.SERVICES6, MapName.BACKENDS4, MapName.BACKENDS6),
        *(MapName.REVERSE_NAT4, MapName.REVERSE_NAT6, MapName.AFFINITY_MATCH),
    }
)


@dataclass(frozen=True, slots=True)
class Control:
    """How an agent writes Services.

    Attributes:
        protocol_in_keys: whether a Service's key has its protocol, or 0 for any.
        orphans_first: delete back ends that are not used any more before anything else (the newer control plane), or last.
    """

    protocol_in_keys: bool
    orphans_first: bool


CONTROLS: Final[Mapping[Version, Control]] = MappingProxyType(
    {
        Version.CURRENT: Control(protocol_in_keys=True, orphans_first=True),
        Version.LEGACY: Control(protocol_in_keys=False, orphans_first=False),
        Version.OLDER: Control(protocol_in_keys=False, orphans_first=False),
        Version.UNKNOWN: Control(protocol_in_keys=True, orphans_first=True),
    }
)
