# SPDX-License-Identifier: Apache-2.0
"""The layouts of Cilium's maps, as data. Pure.

From bpf/lib/{common,eps,lb,metrics}.h and pkg/{loadbalancer/maps,maps} of cilium/cilium, in several versions between 1.11 and
1.19. They are not tied to releases there: `since` is exact only where that text names one, else it follows from the order
of its changes. Nothing depends on it. The type of `cilium_policy_*` in 1.15 and the capacity of any map are not from there.
"""

from typing import Final

from kptrace.dataplanes.cilium.layouts import Layout, Role
from kptrace.dataplanes.cilium.records import Field, Record
from kptrace.kernel.maps import MapType


def _address(size: int, *, at: int = 0, name: str = "address") -> Field:
    return Field(name, at, size, plain=True)


def _port(at: int, name: str = "port") -> Field:
    return Field(name, at, 2, network=True)


def _of_family(number: int, address: int) -> tuple[Layout, ...]:
    """The maps that there are once for IPv4 and once for IPv6; `address`: bytes of one."""
    service_key = Record(
        address + 8,
        (
            _address(address),
            _port(address),
            Field("slot", address + 2, 2),
            Field("protocol", address + 4, 1),
            Field("scope", address + 5, 1),
        ),
    )
    service = Record(
        12,
        (
            Field("backend_id", 0, 4),
            Field("count", 4, 2),
            Field("rev_nat", 6, 2, network=True),
            Field("flags", 8, 1),
            Field("flags2", 9, 1),
            Field("inactive", 10, 2),  # padding, and 0, in older versions
        ),
    )
    backend = (
        _address(address),
        _port(address),
        Field("protocol", address + 2, 1),
        Field("state", address + 3, 1),
    )
    backend_key = Record(4, (Field("backend_id", 0, 4),))
    zone = (Field("cluster_id", address + 4, 2), Field("zone", address + 6, 1))
    tuple_key = Record(
        2 * address + 6,
        (
            _address(address, name="daddr"),
            _address(address, at=address, name="saddr"),
            _port(2 * address, "dport"),
            _port(2 * address + 2, "sport"),
            Field("protocol", 2 * address + 4, 1),
            Field("flags", 2 * address + 5, 1),
        ),
    )
    ct = Record(56, (Field("lifetime", 32, 4), Field("rev_nat", 38, 2, network=True)))
    id_key = Record(2, (Field("rev_nat", 0, 2, network=True),))
    lb = f"cilium_lb{number}_"
    affinity = {4: 16, 16: 24}[address]
    sock = {4: 16, 16: 32}[address]
    return (
        Layout(
            Role(f"lb{number}_services"), lb + "services_v2", _HASH, service_key, service, "1.11 or before", 2
        ),
        Layout(
            Role(f"lb{number}_backends"),
            lb + "backends_v3",
            _HASH,
            backend_key,
            Record(address + 8, (*backend, *zone)),
            "1.13",
            3,
        ),
        Layout(
            Role(f"lb{number}_backends"),
            lb + "backends_v2",
            _HASH,
            backend_key,
            Record(address + 4, backend),
            "1.11",
            2,
        ),
        Layout(
            Role(f"lb{number}_reverse_nat"),
            lb + "reverse_nat",
            _HASH,
            id_key,
            Record(address + 2, (_address(address), _port(address))),
        ),
        Layout(Role(f"lb{number}_reverse_sk"), lb + "reverse_sk", _LRU, Record(sock), Record(address + 4)),
        Layout(Role(f"lb{number}_affinity"), lb + "affinity", _LRU, Record(affinity), Record(16)),
        Layout(Role(f"lb{number}_source_range"), lb + "source_range", _LPM, Record(address + 8), Record(1)),
        Layout(
            Role(f"lb{number}_maglev"), lb + "maglev", frozenset({MapType.HASH_OF_MAPS}), id_key, Record(4)
        ),
        Layout(Role(f"ct{number}"), f"cilium_ct{number}_global", _LRU, tuple_key, ct),
        Layout(Role(f"ct_any{number}"), f"cilium_ct_any{number}_global", _LRU, tuple_key, ct),
    )


_HASH: Final = frozenset({MapType.HASH})
_LRU: Final = frozenset({MapType.LRU_HASH})
_LPM: Final = frozenset({MapType.LPM_TRIE})
_PROGRAMS: Final = frozenset({MapType.PROG_ARRAY})
_LPM_POLICY: Final = Record(
    12,
    (
        Field("prefix", 0, 4),
        Field("identity", 4, 4),
        Field("egress", 8, 1),
        Field("protocol", 9, 1),
        _port(10),
    ),
)
_COUNTED: Final = (Field("packets", 8, 8), Field("bytes", 16, 8))
_PREFIX_KEY: Final = Record(24, (Field("prefix", 0, 4), Field("family", 7, 1), _address(16, at=8)))

#: All that is known, in no order. What is not said of a release is not known of it.
LAYOUTS: Final = (
    *_of_family(4, 4),
    *_of_family(6, 16),
    Layout(
        Role.LB_AFFINITY_MATCH,
        "cilium_lb_affinity_match",
        _HASH,
        Record(8, (Field("backend_id", 0, 4), Field("rev_nat", 4, 2, network=True))),
        Record(1),
    ),
    Layout(
        Role.POLICY,
        "cilium_policy_",
        _HASH,
        Record(8, (Field("identity", 0, 4), _port(4), Field("protocol", 6, 1), Field("egress", 7, 1))),
        Record(24, (_port(0, "proxy_port"), *_COUNTED)),
        "1.15 or before",
        0,
        many=True,
    ),
    Layout(
        Role.POLICY,
        "cilium_policy_",
        _LPM,
        _LPM_POLICY,
        Record(24, (_port(0, "proxy_port"), *_COUNTED)),
        "1.16",
        1,
        many=True,
    ),
    Layout(
        Role.POLICY,
        "cilium_policy_v2_",
        _LPM,
        _LPM_POLICY,
        Record(8, (_port(0, "proxy_port"),)),
        "1.17",
        2,
        many=True,
    ),
    # Its entries can be counted; what is in its values is not known.
    Layout(Role.POLICY, "cilium_policy_v3_", _LPM, Record(12), None, "after 1.19", 3, many=True),
    Layout(
        Role.POLICY_STATS,
        "cilium_policystats",
        frozenset({MapType.LRU_PERCPU_HASH}),
        Record(12, (Field("endpoint", 0, 2), Field("identity", 4, 4), Field("egress", 8, 1))),
        Record(16, (Field("packets", 0, 8), Field("bytes", 8, 8))),
        "1.17",
    ),
    Layout(
        Role.IPCACHE,
        "cilium_ipcache",
        _LPM,
        _PREFIX_KEY,
        Record(12, (Field("identity", 0, 4),)),
        "1.11 or before",
        1,
    ),
    Layout(
        Role.IPCACHE,
        "cilium_ipcache_v2",
        _LPM,
        _PREFIX_KEY,
        Record(24, (Field("identity", 0, 4),)),
        "1.18",
        2,
    ),
    Layout(
        Role.LXC,
        "cilium_lxc",
        _HASH,
        Record(20, (_address(16), Field("family", 16, 1))),
        Record(
            48,
            (Field("ifindex", 0, 4), Field("endpoint", 6, 2), Field("flags", 8, 4), Field("identity", 32, 4)),
        ),
    ),
    Layout(
        Role.METRICS,
        "cilium_metrics",
        frozenset({MapType.PERCPU_HASH}),
        Record(
            8,
            (
                Field("reason", 0, 1),
                Field("direction", 1, 1),  # the two low bits
                Field("line", 2, 2),  # 0 in older versions, as is the file
                Field("file", 4, 1),
            ),
        ),
        Record(16, (Field("count", 0, 8), Field("bytes", 8, 8))),
    ),
    Layout(Role.CALLS, "cilium_calls_", _PROGRAMS, Record(4), Record(4), many=True),
    Layout(Role.CALL_POLICY, "cilium_call_policy", _PROGRAMS, Record(4), Record(4)),
    Layout(Role.CALL_POLICY, "cilium_egresscall_policy", _PROGRAMS, Record(4), Record(4)),
)
