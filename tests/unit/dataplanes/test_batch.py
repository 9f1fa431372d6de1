# SPDX-License-Identifier: Apache-2.0
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kptrace.dataplanes.nftables.batch import (
    MAX_CHAINS,
    MAX_TABLES,
    TAIL_BYTES,
    Batch,
    BatchKind,
    decode_batch,
    is_batch,
    is_end,
)
from kptrace.model.rewrite import ObjectCount
from tests.unit.dataplanes.wire import attribute, batch, message, name, nft, number

TABLE = name(1, "kube-proxy")
HANDLE = attribute(3, bytes(8))
NEWCHAIN, DELCHAIN, NEWRULE, DELRULE, NEWSETELEM, DELSETELEM = 3, 5, 6, 8, 12, 14


def chain_message(operation: int, chain: str = "service-x", *more: bytes) -> bytes:
    """NEWCHAIN or DELCHAIN of a chain in kube-proxy's table."""
    return nft(operation, TABLE, name(3, chain), *more)


def elements(count: int) -> bytes:
    """NFTA_SET_ELEM_LIST_ELEMENTS with so many elements."""
    return attribute(0x8003, b"".join(attribute(0x8001, number(1, n)) for n in range(count)))


def test_the_batch_of_an_endpoint_change_is_counted() -> None:
    """What kube-proxy writes for one endpoint: add a chain that exists, flush it, add a rule with an anonymous map."""
    data = batch(
        chain_message(NEWCHAIN),
        nft(DELRULE, TABLE, name(2, "service-x")),
        nft(9, TABLE, name(2, "__map%d")),
        nft(NEWSETELEM, TABLE, name(2, "__map%d"), elements(3)),
        nft(NEWRULE, TABLE, name(2, "service-x")),
    )
    assert decode_batch(data) == Batch(
        kind=BatchKind.COMMITTABLE,
        tables=frozenset({("ipv4", "kube-proxy")}),
        objects=tuple(
            ObjectCount("ipv4", "kube-proxy", thing, operation, count)
            for thing, operation, count in [
                ("chain", "add", 1),
                ("element", "add", 3),
                ("rule", "add", 1),
                ("rule", "flush", 1),
                ("set", "add", 1),
            ]
        ),
        touched_chains=frozenset({("ipv4", "kube-proxy", "service-x")}),
    )


def test_a_batch_without_its_end_is_only_checked() -> None:
    """`nft --check` sends no BATCH_END."""
    assert decode_batch(batch(chain_message(NEWCHAIN), end=False)).kind is BatchKind.CHECKED


@pytest.mark.parametrize("end", [True, False])
def test_a_batch_without_changes_is_empty(end: bool) -> None:
    """Requests and messages of other subsystems change no rules."""
    assert decode_batch(batch(nft(16), message(1 << 8), end=end)).kind is BatchKind.EMPTY


def test_a_cut_copy_says_so() -> None:
    """The whole messages before the cut count, and everything may have changed beyond."""
    data = batch(chain_message(NEWCHAIN), nft(NEWRULE, TABLE, name(2, "a")))
    for cut in (decode_batch(data[:-30]), decode_batch(data[:-20], len(data))):
        assert cut.kind is BatchKind.UNKNOWN
        assert cut.truncated
        assert cut.base_chain_touched
        assert ObjectCount("ipv4", "kube-proxy", "chain", "add", 1) in cut.objects


def test_the_tail_tells_that_a_cut_batch_commits() -> None:
    """The writer's last bytes are BATCH_END, or the last of a message."""
    data = batch(chain_message(NEWCHAIN))
    assert decode_batch(data[:40], len(data), tail=data[-TAIL_BYTES:]).kind is BatchKind.COMMITTABLE
    checked = batch(chain_message(NEWCHAIN), end=False)
    assert decode_batch(checked[:40], len(checked), tail=checked[-TAIL_BYTES:]).kind is BatchKind.UNKNOWN
    assert not is_end(data[-10:])


def test_a_batch_is_told_by_its_first_message() -> None:
    """BATCH_BEGIN comes first."""
    assert is_batch(batch())
    assert not is_batch(nft(16))
    assert not is_batch(b"\0" * 8)


@pytest.mark.parametrize(
    ("change", "touched"),
    [
        (chain_message(NEWCHAIN), False),
        (chain_message(NEWCHAIN, "filter-input", attribute(4, number(1, 1) + number(2, 0))), True),
        (chain_message(NEWCHAIN, "renamed", attribute(2, bytes(8))), True),
        (chain_message(DELCHAIN), False),
        (nft(DELCHAIN, TABLE, attribute(2, bytes(8))), True),
        (nft(0, TABLE), True),
        (nft(2, TABLE), True),
        (nft(26, TABLE), True),
        (nft(NEWRULE, TABLE, name(2, "filter-input")), False),
    ],
    ids=["plain", "hook", "rename", "delete", "by-handle", "table", "deltable", "destroytable", "rule"],
)
def test_what_may_change_base_chains_is_told(change: bytes, touched: bool) -> None:
    """Only such a batch is worth a re-plan."""
    assert decode_batch(batch(change)).base_chain_touched is touched


@pytest.mark.parametrize("operation", [DELCHAIN, 27])
def test_deleted_chains_are_named(operation: int) -> None:
    """The caller knows which of them are base chains."""
    assert decode_batch(batch(chain_message(operation, "gone"))).deleted_chains == {
        ("ipv4", "kube-proxy", "gone")
    }


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (nft(DELRULE, TABLE, name(2, "c"), HANDLE), ("rule", "delete", 1)),
        (nft(DELRULE, TABLE, name(2, "c"), number(9, 1)), ("rule", "delete", 1)),
        (nft(DELRULE, TABLE), ("rule", "flush", 1)),
        (nft(DELSETELEM, TABLE, name(2, "s"), elements(2)), ("element", "delete", 2)),
        (nft(DELSETELEM, TABLE, name(2, "s")), ("element", "flush", 1)),
        (nft(18, TABLE), ("object", "add", 1)),
        (nft(32, TABLE), ("flowtable", "delete", 1)),
    ],
    ids=["by-handle", "by-id", "flush-rules", "elements", "flush-set", "object", "flowtable"],
)
def test_operations_are_told_apart(change: bytes, expected: tuple[str, str, int]) -> None:
    """Adding, deleting and flushing of every kind of object."""
    (found,) = decode_batch(batch(change)).objects
    assert (found.object, found.operation, found.count) == expected


def test_names_are_bounded() -> None:
    """Tables and chains beyond the bounds are not kept, and the batch says that it knows not all."""
    tables = decode_batch(batch(*[nft(0, name(1, f"t{n}")) for n in range(MAX_TABLES + 5)]))
    assert len(tables.tables) == len(tables.objects) == MAX_TABLES
    assert tables.truncated
    chains = decode_batch(batch(*[chain_message(NEWCHAIN, f"c{n}") for n in range(MAX_CHAINS + 5)]))
    assert len(chains.touched_chains) == MAX_CHAINS
    assert chains.truncated
    assert chains.objects[0].count == MAX_CHAINS + 5


@given(st.binary(max_size=400), st.none() | st.integers(0, 1 << 32), st.binary(max_size=40))
def test_any_bytes_decode(data: bytes, size: int | None, tail: bytes) -> None:
    """Nothing is raised, and no more is found than there can be."""
    decoded = decode_batch(data, size, tail)
    assert sum(each.count for each in decoded.objects) <= len(data)


pieces = st.binary(max_size=12)


@given(
    st.lists(
        st.builds(
            nft,
            st.integers(0, 40),
            st.builds(attribute, st.integers(0, 12), pieces),
            st.builds(attribute, st.integers(0, 12), pieces),
            family=st.integers(0, 12),
        ),
        max_size=12,
    ),
    st.integers(0, 60),
)
def test_a_prefix_never_tells_what_the_whole_does_not(changes: list[bytes], cut: int) -> None:
    """Counts only grow with the copy, and only a cut one is called truncated."""
    data = batch(*changes)
    whole = decode_batch(data)
    part = decode_batch(data[: max(0, len(data) - cut)], len(data))
    counts = {(o.family, o.table, o.object, o.operation): o.count for o in whole.objects}
    assert all(o.count <= counts[o.family, o.table, o.object, o.operation] for o in part.objects)
    assert part.touched_chains <= whole.touched_chains
    assert not whole.truncated
    assert part.truncated == (cut > 0)
