# SPDX-License-Identifier: Apache-2.0
"""Places as C writes them, what they are called, and how many names there may be."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kptrace.model.metrics import OTHER
from kptrace.model.netfilter import DataPlane, Hook, IpFamily
from kptrace.signals import lookup_function_places as places
from kptrace.signals.lookup_cells import CELLS_PER_BRACKET, COUNT_KINDS, BracketLabels
from kptrace.signals.lookup_function_places import (
    FOREIGN_HOST_NAMES,
    FOREIGN_POD_NAMES,
    OTHER_PLACE,
    PLACES,
    Place,
    bounded,
    folded,
)
from tests.unit.c_layout import numbers, run

HEADER = "kptrace/places.h"


def nft(table: str, chain: str, *, pod: bool = False, hook: Hook = Hook.OUTPUT) -> Place:
    """A chain of nf_tables."""
    return Place(pod, BracketLabels(DataPlane.NFTABLES, IpFamily.IPV4, hook, table, chain))


def written(folder: Path, members: str, table: str, chain: str = "") -> Place:
    """What C's `struct name` with these members and names is read as."""
    copies = "".join(
        f'for (int i = 0; "{text}"[i]; i++) ((char *)it.{member})[i] = "{text}"[i];\n'
        for member, text in (("table", table), ("chain", chain))
    )
    return Place.decode(run(folder, HEADER, f"struct name it = {{ {members} }};\n{copies}dump(it);"))


@pytest.mark.parametrize(
    ("family", "table", "chain", "dataplane"),
    [
        (2, "kube-proxy", "nat-output", DataPlane.NFTABLES),
        (2, "filter", "OUTPUT", DataPlane.IPTABLES_NFT),
        (1, "filter", "OUTPUT", DataPlane.NFTABLES),
    ],
)
def test_a_chain_is_read_as_c_writes_it(
    tmp_path: Path, family: int, table: str, chain: str, dataplane: DataPlane
) -> None:
    """Every member arrives under its own name; the data plane is found as in a dump."""
    members = f".pod = 1, .nfproto = 10, .hook = 3, .table_family = {family}"
    place = written(tmp_path, members, table, chain)
    assert place == Place(True, BracketLabels(dataplane, IpFamily.IPV6, Hook.OUTPUT, table, chain))
    assert place.netns == "pod"


def test_a_legacy_table_has_a_built_in_chain(tmp_path: Path) -> None:
    """Named like its hook, in capital letters, as brackets call it."""
    place = written(tmp_path, ".legacy = 1, .nfproto = 2, .hook = 4", "nat")
    labels = BracketLabels(DataPlane.IPTABLES_LEGACY, IpFamily.IPV4, Hook.POSTROUTING, "nat", "POSTROUTING")
    assert place == Place(False, labels)


def test_numbers_and_sizes_are_the_headers(tmp_path: Path) -> None:
    """What both sides count with."""
    expected = {
        "HOST_PLACES": places.HOST_PLACES,
        "POD_PLACES": places.POD_PLACES,
        "OTHER_PLACE": OTHER_PLACE,
        "OWNERS": PLACES,
        "HOOKS": len(Hook),
        "sizeof(struct name)": places.NAME_BYTES,
        "sizeof(struct learnt)": places.LEARNT.size,
        "__builtin_offsetof(struct learnt, folded)": places.LEARNT.size - 8,
        "sizeof(struct chain_key)": 24,
        "STRING_WORDS * 8": 64,
    }
    assert numbers(tmp_path, HEADER, *expected) == expected
    assert OTHER_PLACE + 2 * 2 * 2 * len(Hook) == PLACES
    assert (CELLS_PER_BRACKET, COUNT_KINDS) == (20, 4)


@given(st.integers(OTHER_PLACE, PLACES - 1))
def test_what_got_no_number_keeps_hook_family_and_namespace(number: int) -> None:
    """The C source's arithmetic, the other way."""
    place = folded(number)
    labels = place.labels
    legacy = labels.dataplane is DataPlane.IPTABLES_LEGACY
    kind = (place.pod * 2 + legacy) * 2 + (labels.family is IpFamily.IPV6)
    assert OTHER_PLACE + kind * len(Hook) + labels.hook == number
    assert (labels.table, labels.chain) == (OTHER, OTHER)


def test_foreign_names_are_bounded_first_come_first_served() -> None:
    """Beyond the bound they are ~other, together; kube-proxy's and iptables' own never are."""
    many = {number: nft(f"t{number}", "c") for number in range(FOREIGN_HOST_NAMES + 5)}
    own = {100: nft("kube-proxy", "nat-output"), 101: nft("kube-proxy", "late")}
    legacy = BracketLabels(DataPlane.IPTABLES_LEGACY, IpFamily.IPV4, Hook.INPUT, "filter", "INPUT")
    exposed = bounded({**many, **own, 102: Place(False, legacy)})
    told = [place for place in exposed if place.labels.table.startswith("t")]
    assert [place.labels.table for place in told] == [f"t{number}" for number in range(FOREIGN_HOST_NAMES)]
    rest = nft(OTHER, OTHER)
    assert exposed[rest] == tuple(range(FOREIGN_HOST_NAMES, FOREIGN_HOST_NAMES + 5))
    assert exposed[own[100]] == (100,)
    assert exposed[Place(False, legacy)] == (102,)


def test_pods_do_not_use_up_the_hosts_names() -> None:
    """They have fewer of their own; in a pod anybody may call a table kube-proxy."""
    pods = {number: nft("kube-proxy", f"c{number}", pod=True) for number in range(FOREIGN_POD_NAMES + 3)}
    exposed = bounded({**pods, 150: nft("mine", "c")})
    assert sum(place.pod and place.labels.table == "kube-proxy" for place in exposed) == FOREIGN_POD_NAMES
    assert exposed[nft("mine", "c")] == (150,)


def test_one_name_at_several_hooks_is_one_name() -> None:
    """A name counts once however often it is seen."""
    many = {
        number: nft(f"t{number // 5}", "c", hook=Hook(number % 5)) for number in range(FOREIGN_HOST_NAMES * 5)
    }
    assert all(exposed.labels.table != OTHER for exposed in list(bounded(many))[: len(many)])


@given(
    st.dictionaries(
        st.integers(0, OTHER_PLACE - 1), st.builds(nft, st.text(max_size=2), st.just("c"), pod=st.booleans())
    )
)
def test_every_number_is_exposed_once(known: dict[int, Place]) -> None:
    """Nothing is lost and nothing counted twice, and a number more changes no label that was there."""
    exposed = bounded(known)
    every = [number for numbers_ in exposed.values() for number in numbers_]
    assert sorted(every) == sorted([*known, *range(OTHER_PLACE, PLACES)])
    if known:
        fewer = bounded({number: place for number, place in known.items() if number != max(known)})
        for place, before in fewer.items():
            assert set(before) <= set(exposed[place])


def test_names_are_cut_as_elsewhere() -> None:
    """To 64 bytes, no character halved; what is no UTF-8 is left out."""
    value = bytes([0, 0, 2, 0, 2, 0, 0, 0]) + ("x" * 63 + "é").encode()[:64] + b"a\xffb".ljust(64, b"\0")
    assert Place.decode(value).labels.table == "x" * 63
    assert Place.decode(value).labels.chain == "ab"
