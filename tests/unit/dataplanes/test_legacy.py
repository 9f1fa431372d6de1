# SPDX-License-Identifier: Apache-2.0
import struct
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from kptrace.dataplanes.iptables.legacy import Replace, decode_replace, legacy_chains, table_names
from kptrace.model.netfilter import ChainType, DataPlane, Hook, IpFamily


def header(table: bytes, old: int = 5) -> bytes:
    """A `struct ipt_replace` of a 64-bit writer."""
    return struct.pack("=32s3I5I5II4xQ", table, 0b11011, 8008, 3_100_000, *range(10), old, 0xDEAD)


def test_names_are_read_per_family(tmp_path: Path) -> None:
    """A family whose file is missing has no tables."""
    (tmp_path / "ip_tables_names").write_text("nat\nfilter\n")
    assert table_names(tmp_path) == {
        IpFamily.IPV4: frozenset({"nat", "filter"}),
        IpFamily.IPV6: frozenset(),
    }


def test_tables_hook_where_the_kernel_has_them() -> None:
    """Every table's hooks and priorities are `enum nf_ip_hook_priorities`; other names have none."""
    tables = frozenset({"raw", "mangle", "nat", "filter", "security", "mine"})
    found = {(c.table, c.hook): c for c in legacy_chains({IpFamily.IPV4: tables, IpFamily.IPV6: frozenset()})}
    assert {key: c.priority for key, c in found.items()} == {
        ("raw", Hook.PREROUTING): -300,
        ("raw", Hook.OUTPUT): -300,
        **{("mangle", hook): -150 for hook in Hook},
        ("nat", Hook.PREROUTING): -100,
        ("nat", Hook.INPUT): 100,
        ("nat", Hook.OUTPUT): -100,
        ("nat", Hook.POSTROUTING): 100,
        **{("filter", hook): 0 for hook in (Hook.INPUT, Hook.FORWARD, Hook.OUTPUT)},
        **{("security", hook): 50 for hook in (Hook.INPUT, Hook.FORWARD, Hook.OUTPUT)},
    }
    assert {c.dataplane for c in found.values()} == {DataPlane.IPTABLES_LEGACY}
    assert all(c.effective_priority == c.priority for c in found.values())
    assert found["mangle", Hook.OUTPUT].type is ChainType.ROUTE
    assert found["mangle", Hook.INPUT].type is ChainType.FILTER
    assert found["nat", Hook.OUTPUT].type is ChainType.NAT
    assert found["nat", Hook.OUTPUT].chain == "OUTPUT"


def test_a_replacement_tells_table_entries_and_size() -> None:
    """The header's fields are read from the option's value."""
    assert decode_replace(header(b"nat") + b"entries") == Replace("nat", 0b11011, 8008, 3_100_000, 5)


def test_a_short_copy_tells_less() -> None:
    """Without the later fields the old number of entries is unknown, without the earlier ones all is."""
    assert decode_replace(header(b"nat")[:44]) == Replace("nat", 0b11011, 8008, 3_100_000, None)
    assert decode_replace(header(b"nat")[:43]) is None


@given(st.binary(max_size=120))
def test_any_bytes_decode(data: bytes) -> None:
    """Nothing is raised, whatever the writer sent."""
    assert (decode_replace(data) is None) == (len(data) < 44)
