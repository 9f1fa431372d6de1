# SPDX-License-Identifier: Apache-2.0
"""The layouts of Cilium's maps against what a C compiler makes of the same members, and how maps are told apart."""

import subprocess
from pathlib import Path

import pytest

from kptrace.dataplanes.cilium.layout_table import LAYOUTS
from kptrace.dataplanes.cilium.layouts import KERNEL_NAME, Layout, Role
from kptrace.dataplanes.cilium.recognise import UnknownLayout, recognise
from kptrace.dataplanes.cilium.records import Record
from kptrace.experiments.cilium_layouts import LAYOUTS as MADE
from kptrace.experiments.cilium_layouts import Version
from kptrace.kernel.maps import MapType

# The members in their order, with Cilium's types; `prefix` is that of a longest-prefix key.
_STRUCTS = {
    "service_key4": "ip4 address; be16 port; u16 slot; u8 protocol; u8 scope; u8 pad[2];",
    "service_key6": "u8 address[16]; be16 port; u16 slot; u8 protocol; u8 scope; u8 pad[2];",
    "service": "union { u32 backend_id; u32 timeout; }; u16 count; be16 rev_nat; u8 flags; u8 flags2; u16 inactive;",
    "backend4_v2": "ip4 address; be16 port; u8 protocol; u8 state;",
    "backend6_v2": "u8 address[16]; be16 port; u8 protocol; u8 state;",
    "backend4_v3": "ip4 address; be16 port; u8 protocol; u8 state; u16 cluster_id; u8 zone; u8 pad;",
    "backend6_v3": "u8 address[16]; be16 port; u8 protocol; u8 state; u16 cluster_id; u8 zone; u8 pad;",
    "backend_id": "u32 backend_id;",
    "reverse_id": "be16 rev_nat;",
    "reverse4": "u8 address[4]; be16 port;",
    "reverse6": "u8 address[16]; be16 port;",
    "sock_key4": "u64 cookie; u32 address; be16 port; u16 pad;",
    "sock_key6": "u64 cookie; u8 address[16]; u32 port; u32 pad;",
    "sock4": "u32 address; be16 port; be16 rev_nat;",
    "sock6": "u8 address[16]; be16 port; be16 rev_nat;",
    "affinity_key4": "u64 client; u16 rev_nat; u8 bits; u8 pad1; u32 pad2;",
    "affinity_key6": "u8 client[16]; u16 rev_nat; u8 bits; u8 pad1; u32 pad2;",
    "affinity": "u64 used; u32 backend_id; u32 pad;",
    "match": "u32 backend_id; be16 rev_nat; u16 pad;",
    "source4": "u32 prefix; u16 rev_nat; u16 pad; u32 address;",
    "source6": "u32 prefix; u16 rev_nat; u16 pad; u8 address[16];",
    "tuple4": "u8 daddr[4]; u8 saddr[4]; be16 dport; be16 sport; u8 protocol; u8 flags;",
    "tuple6": "u8 daddr[16]; u8 saddr[16]; be16 dport; be16 sport; u8 protocol; u8 flags;",
    "ct": "u64 reserved, backend_id, packets, bytes; u32 lifetime; u16 bits; be16 rev_nat; u16 nat_port; u8 tx, rx;"
    " u32 identity, last_tx, last_rx;",
    "policy_key1": "u32 identity; be16 port; u8 protocol; u8 egress;",
    "policy1": "be16 proxy_port; u8 bits; u8 auth; u32 pad; u64 packets; u64 bytes;",
    "policy_key": "u32 prefix; u32 identity; u8 egress; u8 protocol; be16 port;",
    "policy2": "be16 proxy_port; u8 bits; u8 auth; u8 priority; u8 pad1; u16 pad2;",
    "policy_stats_key": "u16 endpoint; u8 pad; u8 prefix_length; u32 identity; u8 egress; u8 protocol; be16 port;",
    "policy_stats": "u64 packets; u64 bytes;",
    "ipcache_key": "u32 prefix; u16 cluster_id; u8 pad; u8 family; u8 address[16];",
    "ipcache1": "u32 identity; u32 tunnel; u16 node; u8 key; u8 flags;",
    "ipcache2": "u32 identity; u8 tunnel[16]; u16 pad; u8 key; u8 flags;",
    "lxc_key": "u8 address[16]; u8 family; u8 key; u16 cluster_id;",
    "lxc": "u32 ifindex; u16 unused; u16 endpoint; u32 flags; u64 mac; u64 node_mac; u32 identity; u32 parent; u32 pad[2];",
    "metrics_key": "u8 reason; u8 direction; u16 line; u8 file; u8 reserved[3];",
    "metrics": "u64 count; u64 bytes;",
    "index": "u32 index;",
    "inner": "u32 id;",
    "yes": "u8 yes;",
}
# Layouts by name and type: structures of key and value.
_OF = {
    ("cilium_lb4_services_v2", 1): ("service_key4", "service"),
    ("cilium_lb6_services_v2", 1): ("service_key6", "service"),
    ("cilium_lb4_backends_v2", 1): ("backend_id", "backend4_v2"),
    ("cilium_lb6_backends_v2", 1): ("backend_id", "backend6_v2"),
    ("cilium_lb4_backends_v3", 1): ("backend_id", "backend4_v3"),
    ("cilium_lb6_backends_v3", 1): ("backend_id", "backend6_v3"),
    ("cilium_lb4_reverse_nat", 1): ("reverse_id", "reverse4"),
    ("cilium_lb6_reverse_nat", 1): ("reverse_id", "reverse6"),
    ("cilium_lb4_reverse_sk", 9): ("sock_key4", "sock4"),
    ("cilium_lb6_reverse_sk", 9): ("sock_key6", "sock6"),
    ("cilium_lb4_affinity", 9): ("affinity_key4", "affinity"),
    ("cilium_lb6_affinity", 9): ("affinity_key6", "affinity"),
    ("cilium_lb_affinity_match", 1): ("match", "yes"),
    ("cilium_lb4_source_range", 11): ("source4", "yes"),
    ("cilium_lb6_source_range", 11): ("source6", "yes"),
    ("cilium_lb4_maglev", 13): ("reverse_id", "inner"),
    ("cilium_lb6_maglev", 13): ("reverse_id", "inner"),
    ("cilium_ct4_global", 9): ("tuple4", "ct"),
    ("cilium_ct_any4_global", 9): ("tuple4", "ct"),
    ("cilium_ct6_global", 9): ("tuple6", "ct"),
    ("cilium_ct_any6_global", 9): ("tuple6", "ct"),
    ("cilium_policy_", 1): ("policy_key1", "policy1"),
    ("cilium_policy_", 11): ("policy_key", "policy1"),
    ("cilium_policy_v2_", 11): ("policy_key", "policy2"),
    ("cilium_policy_v3_", 11): ("policy_key", ""),
    ("cilium_policystats", 10): ("policy_stats_key", "policy_stats"),
    ("cilium_ipcache", 11): ("ipcache_key", "ipcache1"),
    ("cilium_ipcache_v2", 11): ("ipcache_key", "ipcache2"),
    ("cilium_lxc", 1): ("lxc_key", "lxc"),
    ("cilium_metrics", 5): ("metrics_key", "metrics"),
    ("cilium_calls_", 3): ("index", "inner"),
    ("cilium_call_policy", 3): ("index", "inner"),
    ("cilium_egresscall_policy", 3): ("index", "inner"),
}
_TYPES = """\
#include <stddef.h>
#include <stdio.h>
typedef unsigned char u8; typedef unsigned short u16, be16; typedef unsigned int u32; typedef unsigned long long u64;
typedef u8 ip4[4] __attribute__((aligned(4)));
"""


def _by_id(layout: Layout) -> tuple[str, int]:
    (only,) = layout.types
    return layout.name, only


def _records() -> list[tuple[str, Record]]:
    """Each structure with each record that is to be of its form."""
    pairs = []
    for layout in LAYOUTS:
        for name, record in zip(_OF[_by_id(layout)], (layout.key, layout.value), strict=True):
            if record is not None:
                pairs.append((name, record))
    return pairs


def test_every_layout_is_what_a_compiler_makes_of_its_members(tmp_path: Path) -> None:
    """Sizes of all keys and values, and offset and size of every member that is read."""
    pairs = _records()
    lines = [_TYPES]
    lines += [f"struct {name} {{ {members} }};" for name, members in _STRUCTS.items()]
    lines.append("int main(void) {")
    for name, record in pairs:
        lines.append(f'printf("%zu\\n", sizeof(struct {name}));')
        for field in record.members:
            member = f"((struct {name} *)0)->{field.name}"
            lines.append(f'printf("%zu %zu\\n", offsetof(struct {name}, {field.name}), sizeof({member}));')
    lines.append("return 0; }")
    source, program = tmp_path / "layouts.c", tmp_path / "layouts"
    source.write_text("\n".join(lines))
    subprocess.run(["gcc", "-std=gnu11", "-Wall", "-Werror", "-o", program, source], check=True)
    shown = subprocess.run([program], check=True, capture_output=True, text=True).stdout.splitlines()
    expected = []
    for _, record in pairs:
        expected.append(str(record.size))
        expected += [f"{field.offset} {field.size}" for field in record.members]
    assert shown == expected


def test_network_order_is_where_the_members_say_so() -> None:
    """A number is in network order exactly where its C type is; addresses are bytes either way."""
    for name, record in _records():
        for field in record.members:
            assert field.network == (f"be16 {field.name};" in _STRUCTS[name]), (name, field)
            assert field.plain == (field.name in ("address", "saddr", "daddr")), (name, field)


def test_every_layout_is_recognised_by_its_whole_name_and_by_what_the_kernel_keeps_of_it() -> None:
    """Sizes tell those apart that share 15 characters, but for values that are not looked into."""
    for layout in LAYOUTS:
        whole = layout.name + ("00042" if layout.many else "")
        sizes = layout.key.size if layout.key else 0, layout.value.size if layout.value else 24
        (kind,) = layout.types
        assert recognise(whole, whole[:KERNEL_NAME], kind, *sizes) is layout
        by_kernel = recognise("", whole[:KERNEL_NAME], kind, *sizes)
        assert isinstance(by_kernel, Layout)
        assert by_kernel.role is layout.role
        assert by_kernel is layout or layout.name in ("cilium_call_policy", "cilium_policy_v3_")


@pytest.mark.parametrize("version", [Version.CURRENT, Version.OLDER])
def test_the_maps_of_both_versions_of_the_experiments_agent_are_all_known(version: Version) -> None:
    """Two tellings of the same sources agree, by whole names and by cut ones."""
    for name, spec in MADE[version].items():
        whole = recognise(spec.name, spec.name[:KERNEL_NAME], spec.type, spec.key_size, spec.value_size)
        cut = recognise("", spec.name[:KERNEL_NAME], spec.type, spec.key_size, spec.value_size)
        assert isinstance(whole, Layout), name
        assert whole.role is not Role.OTHER, name
        assert cut is whole, name


def test_layouts_that_nobody_knows_are_refused_with_a_message() -> None:
    """The message says whose map it is, what it is like, and what would have been known; nothing is raised."""
    refused = {}
    for spec in MADE[Version.UNKNOWN].values():
        found = recognise(spec.name, spec.name[:KERNEL_NAME], spec.type, spec.key_size, spec.value_size)
        if isinstance(found, UnknownLayout):
            refused[spec.name] = found
    assert {name: found.role for name, found in refused.items()} == {
        "cilium_lb4_backends_v3": Role.LB4_BACKENDS,
        "cilium_lb6_backends_v4": Role.LB6_BACKENDS,
        "cilium_policy_v3_00042": Role.POLICY,
    }
    assert refused["cilium_lb4_backends_v3"].detail == (
        "cilium_lb4_backends_v3 has keys of 4 and values of 16 bytes and is of type 1: no layout that is known "
        "(cilium_lb4_backends_v3 4/12 of type 1); it is not read"
    )
    newer = refused["cilium_lb6_backends_v4"].detail
    assert "cilium_lb6_backends_v3 4/24" in newer
    assert "cilium_lb6_backends_v2 4/20" in newer


def test_another_versions_name_is_no_known_layout_even_if_the_sizes_fit() -> None:
    """A new number says that something changed; the oldest maps, without one, are refused as well."""
    for name in ("cilium_lb4_backends_v4", "cilium_lb4_backends", "cilium_policy_v9_00042", "cilium_lxc_v2"):
        for sizes in ((4, 12), (12, 8), (20, 48)):
            assert isinstance(recognise(name, name[:KERNEL_NAME], MapType.HASH, *sizes), UnknownLayout), name


def test_cut_names_with_strange_sizes_are_refused_too() -> None:
    """Without a pin `cilium_lb4_back` may be any version, but none of this size."""
    found = recognise("", "cilium_lb4_back", MapType.HASH, 4, 16)
    assert isinstance(found, UnknownLayout)
    assert found.role is Role.LB4_BACKENDS
    assert found.name == "cilium_lb4_back"


def test_other_maps_of_ciliums_are_known_to_be_that() -> None:
    """What nobody reads is no problem, and others' maps are nothing."""
    other = recognise("cilium_signals", "cilium_signals", 4, 4, 4)
    assert isinstance(other, Layout)
    assert other.role is Role.OTHER
    assert recognise("", "calico_v4_nat_f", MapType.HASH, 12, 12) is None


def test_endpoints_are_in_the_whole_names_of_their_maps() -> None:
    """Of calls and policies; the host's and the devices' call maps have other things there."""
    calls = next(layout for layout in LAYOUTS if layout.role is Role.CALLS)
    assert calls.endpoint("cilium_calls_00042") == 42
    assert calls.endpoint("cilium_calls_netdev_00002") is None
    lxc = next(layout for layout in LAYOUTS if layout.role is Role.LXC)
    assert lxc.endpoint("cilium_lxc") is None


def test_records_have_the_size_that_they_must_have() -> None:
    """Bytes that are too few or too many are refused, whoever sent them."""
    record = Record(4)
    assert record.decode(bytes(4)) == {}
    for size in (3, 5):
        with pytest.raises(ValueError, match=f"{size} bytes where the layout has 4"):
            record.decode(bytes(size))


def test_members_are_in_order_and_do_not_overlap() -> None:
    """Decoding goes through them once."""
    for name, record in _records():
        ends = [0, *(field.offset + field.size for field in record.members)]
        begins = [*(field.offset for field in record.members), record.size]
        assert all(begin >= end for begin, end in zip(begins, ends, strict=True)), name


def test_all_members_survive_both_ways() -> None:
    """Numbers as large as they can be but for one bit, so that the order of bytes shows."""
    for _, record in _records():
        values = {
            field.name: bytes(range(1, field.size + 1)) if field.plain else (1 << 8 * field.size - 1) + 1
            for field in record.members
        }
        assert record.decode(record.encode(values)) == values
