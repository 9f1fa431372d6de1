# SPDX-License-Identifier: Apache-2.0
"""The sizes that the maps are made with are those of the structures that the programs read them with."""

import shutil
from pathlib import Path

import pytest

from kptrace.experiments import cilium_entries as entries
from kptrace.experiments.cilium_layouts import LAYOUTS, MapName, Version
from kptrace.model.identity import Protocol, ServiceAddress
from tests.unit.c_layout import numbers

HEADER = "kptrace/datapath_fixture.h"
STRUCTURES = {
    "lb4_key": (MapName.SERVICES4, "key"),
    "lb6_key": (MapName.SERVICES6, "key"),
    "lb_service": (MapName.SERVICES4, "value"),
    "reverse4": (MapName.REVERSE_NAT4, "value"),
    "socket4_key": (MapName.SOCKETS4, "key"),
    "socket4_value": (MapName.SOCKETS4, "value"),
    "socket6_key": (MapName.SOCKETS6, "key"),
    "socket6_value": (MapName.SOCKETS6, "value"),
    "ct4_key": (MapName.CT4, "key"),
    "ct_entry": (MapName.CT4, "value"),
    "metric_key": (MapName.METRICS, "key"),
    "metric": (MapName.METRICS, "value"),
}


def size(version: Version, name: MapName, side: str) -> int:
    """Bytes of a map's keys or values."""
    spec = LAYOUTS[version][name]
    return spec.key_size if side == "key" else spec.value_size


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_structures_are_as_large_as_the_entries(tmp_path: Path) -> None:
    """By the C compiler; what is read of a back end is in every version's values."""
    structures = (*STRUCTURES, "lb4_backend", "lb6_backend")
    told = numbers(tmp_path, HEADER, *(f"sizeof(struct {name})" for name in structures))
    *sizes, backend4, backend6 = told.values()
    for version in Version:
        assert sizes == [size(version, *place) for place in STRUCTURES.values()]
        assert backend4 <= size(version, MapName.BACKENDS4, "value")
        assert backend6 <= size(version, MapName.BACKENDS6, "value")


@pytest.mark.parametrize("version", Version)
def test_entries_are_as_large_as_the_maps_say(version: Version) -> None:
    """Every encoder, in both families and every version."""
    for family, ip in (("4", "10.0.0.1"), ("6", "fd00::1")):
        address = ServiceAddress(ip, 80, Protocol.TCP)
        services, backends, reverse = (
            MapName[f"{name}{family}"] for name in ("SERVICES", "BACKENDS", "REVERSE_NAT")
        )
        sizes = {
            services: (entries.service_key(address, 1, protocol=True), entries.service_value(1, backend=7)),
            backends: (
                entries.backend_key(7),
                entries.backend_value(ip, 80, 6, 0, size(version, backends, "value")),
            ),
            reverse: (entries.reverse_key(1), entries.reverse_value(address)),
        }
        for name, (key, value) in sizes.items():
            assert (len(key), len(value)) == (size(version, name, "key"), size(version, name, "value"))
    assert len(entries.affinity_match_key(1, 2)) == size(version, MapName.AFFINITY_MATCH, "key")
    assert len(entries.endpoint_key("10.0.0.1")) == size(version, MapName.LXC, "key")
    assert len(entries.endpoint_value(3, 42, 7)) == size(version, MapName.LXC, "value")
    ipcache = size(version, MapName.IPCACHE, "value")
    key, value = entries.ipcache_entry("10.0.0.0/8", 7, ipcache)
    assert (len(key), len(value)) == (size(version, MapName.IPCACHE, "key"), ipcache)
    policy = LAYOUTS[version][MapName.POLICY]
    key, value = entries.allow_entry(policy.key_size, policy.value_size, egress=True)
    assert (len(key), len(value)) == (policy.key_size, policy.value_size)


def test_names_are_cilium_s() -> None:
    """The older agent has other maps for back ends and policies, the unknown one sizes that no agent has."""
    assert LAYOUTS[Version.OLDER][MapName.BACKENDS4].name == "cilium_lb4_backends_v2"
    assert MapName.POLICY_STATISTICS not in LAYOUTS[Version.OLDER]
    assert (
        LAYOUTS[Version.UNKNOWN][MapName.BACKENDS4].name == LAYOUTS[Version.CURRENT][MapName.BACKENDS4].name
    )
    assert size(Version.UNKNOWN, MapName.BACKENDS4, "value") not in (8, 12)
