# SPDX-License-Identifier: Apache-2.0
"""Sizes of the ruleset: what a batch does to them is what a dump afterwards would say, or they are called inexact."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kptrace.dataplanes.nftables import objects
from kptrace.dataplanes.nftables.object_changes import apply_batch, take_object
from kptrace.dataplanes.nftables.objects import Inventory
from tests.unit.dataplanes.wire import attribute, batch, message, name, nft, number

NEWTABLE, DELTABLE, NEWCHAIN, DELCHAIN, NEWRULE, DELRULE = 0, 2, 3, 5, 6, 8
NEWSET, DELSET, NEWSETELEM, DELSETELEM = 9, 11, 12, 14
INET, IPV4, NETDEV, IPV6 = 1, 2, 5, 10
REQUEST, REPLACE = 0x1, 0x100
ANONYMOUS, TIMEOUT, EVAL = 0x1, 0x10, 0x20
HANDLE = bytes(7) + b"\5"
INTERVAL_END, CATCHALL = 1, 2


def do(operation: int, *attributes: bytes, family: int = IPV4, flags: int = 0) -> bytes:
    """A request."""
    return nft(operation, *attributes, family=family, flags=REQUEST | flags)


def table(operation: int = NEWTABLE, table_name: str = "t", *more: bytes, family: int = IPV4) -> bytes:
    """A request about a table."""
    return do(operation, name(1, table_name), *more, family=family)


def chain(operation: int, chain_name: str, *more: bytes, family: int = IPV4, of: str = "t") -> bytes:
    """A request about a chain of the table."""
    return do(operation, name(1, of), name(3, chain_name), *more, family=family)


def rule(operation: int, *more: bytes, flags: int = 0) -> bytes:
    """A request about a rule of the table."""
    return do(operation, name(1, "t"), *more, flags=flags)


def set_(operation: int, set_name: str, flags: int = 0) -> bytes:
    """A request about a set of the table."""
    return do(operation, name(1, "t"), name(2, set_name), number(3, flags))


def element(value: int, flags: int = 0, nested: int = 0x8000) -> bytes:
    """One element; `nested` is or-ed to its key's type, as requests have it and old dumps do not."""
    key = attribute(nested | 1, attribute(1, value.to_bytes(4, "big")))
    return attribute(0x8001, key + (number(3, flags) if flags else b""))


def elements(operation: int, set_name: str, *each: bytes) -> bytes:
    """A request about elements of a set; without any it is about all."""
    listed = [attribute(0x8003, b"".join(each))] if each else []
    return do(operation, name(1, "t"), name(2, set_name), *listed)


def hook(number_: int) -> bytes:
    """NFTA_CHAIN_HOOK."""
    return attribute(0x8004, number(1, number_) + number(2, 0))


def filled(*more: bytes) -> Inventory:
    """A table with the chains a (two rules), b (one) and a set s of three, and what more is committed then."""
    made = Inventory(7)
    apply_batch(
        made,
        batch(
            table(),
            chain(NEWCHAIN, "a"),
            chain(NEWCHAIN, "b"),
            rule(NEWRULE, name(2, "a")),
            rule(NEWRULE, name(2, "a")),
            rule(NEWRULE, name(2, "b")),
            set_(NEWSET, "s"),
            elements(NEWSETELEM, "s", element(1), element(2), element(3)),
        ),
    )
    assert made.exact
    apply_batch(made, batch(*more))
    return made


def sizes(inventory: Inventory, family: int = IPV4, of: str = "t") -> tuple[int, int, int, int]:
    """Chains, rules, sets and elements of one table."""
    counts = inventory.tables[family, of].counts()
    return counts["chain"], counts["rule"], counts["set"], counts["element"]


def state(inventory: Inventory) -> Mapping[tuple[int, str], object]:
    """Everything that it knows of the tables."""
    return {
        key: (each.chains, each.base, {set_name: found.keys for set_name, found in each.sets.items()})
        for key, each in inventory.tables.items()
    }


CHANGES = {
    "nothing": ((), (2, 3, 1, 3)),
    "chain": ((chain(NEWCHAIN, "c"),), (3, 3, 1, 3)),
    "chain-again": ((chain(NEWCHAIN, "a"),), (2, 3, 1, 3)),
    "delete-chain": ((chain(DELCHAIN, "a"),), (1, 1, 1, 3)),
    "rule": ((rule(NEWRULE, name(2, "b")),), (2, 4, 1, 3)),
    "replace-rule": ((rule(NEWRULE, name(2, "b"), attribute(3, HANDLE), flags=REPLACE),), (2, 3, 1, 3)),
    "delete-rule": ((rule(DELRULE, name(2, "a"), attribute(3, HANDLE)),), (2, 2, 1, 3)),
    "delete-rule-by-id": ((rule(DELRULE, name(2, "a"), number(9, 1)),), (2, 2, 1, 3)),
    "flush-chain": ((rule(DELRULE, name(2, "a")),), (2, 1, 1, 3)),
    "flush-table": ((rule(DELRULE),), (2, 0, 1, 3)),
    # nf_tables_delrule() looks at a handle only where there is a chain.
    "flush-table-with-handle": ((rule(DELRULE, attribute(3, HANDLE)),), (2, 0, 1, 3)),
    "set": ((set_(NEWSET, "u"),), (2, 3, 2, 3)),
    "set-again": ((set_(NEWSET, "s"),), (2, 3, 1, 3)),
    "anonymous-set": (
        (set_(NEWSET, "__set%d", ANONYMOUS), elements(NEWSETELEM, "__set%d", element(8))),
        (2, 3, 1, 3),
    ),
    "delete-set": ((set_(DELSET, "s"),), (2, 3, 0, 0)),
    "element": ((elements(NEWSETELEM, "s", element(4)),), (2, 3, 1, 4)),
    "element-again": ((elements(NEWSETELEM, "s", element(3), element(3)),), (2, 3, 1, 3)),
    "interval": ((elements(NEWSETELEM, "s", element(8), element(9, INTERVAL_END)),), (2, 3, 1, 4)),
    "catch-all": ((elements(NEWSETELEM, "s", element(0, CATCHALL), element(5, CATCHALL)),), (2, 3, 1, 4)),
    "delete-element": ((elements(DELSETELEM, "s", element(2), element(99)),), (2, 3, 1, 2)),
    "flush-set": ((elements(DELSETELEM, "s"),), (2, 3, 1, 0)),
    "other-table": ((table(NEWTABLE, "u"), chain(NEWCHAIN, "a", of="u")), (2, 3, 1, 3)),
    "other-family": ((table(family=IPV6), chain(DELCHAIN, "a", family=IPV6)), (2, 3, 1, 3)),
    "other-subsystem": ((message(1 << 8, name(1, "t"), flags=REQUEST),), (2, 3, 1, 3)),
    "unseen-anonymous-set": ((elements(NEWSETELEM, "__set3", element(8)),), (2, 3, 1, 3)),
    "object": ((do(18, name(1, "t"), name(2, "counter")),), (2, 3, 1, 3)),
    "bound-chain": ((chain(NEWCHAIN, "", number(10, 4)),), (2, 3, 1, 3)),
    "delete-and-add": ((chain(DELCHAIN, "a"), chain(NEWCHAIN, "a")), (2, 1, 1, 3)),
}


@pytest.mark.parametrize(("changes", "expected"), CHANGES.values(), ids=CHANGES)
def test_a_committed_batch_changes_the_sizes(
    changes: tuple[bytes, ...], expected: tuple[int, int, int, int]
) -> None:
    """Chains, rules, sets and elements after each kind of request that tells enough."""
    inventory = filled(*changes)
    assert sizes(inventory) == expected
    assert inventory.exact


UNTOLD = {
    "chain-of-unknown-table": chain(NEWCHAIN, "a", of="gone"),
    "renamed-chain": chain(NEWCHAIN, "new", attribute(2, HANDLE)),
    "chain-by-handle": do(DELCHAIN, name(1, "t"), attribute(2, HANDLE)),
    "rule-in-unknown-chain": rule(NEWRULE, name(2, "gone")),
    "rule-in-chain-by-id": rule(NEWRULE, number(11, 1)),
    "flush-of-unknown-chain": rule(DELRULE, name(2, "gone")),
    "flush-of-chain-by-id": rule(DELRULE, number(11, 1)),
    "table-by-handle": do(DELTABLE, attribute(4, HANDLE)),
    "set-by-handle": do(DELSET, name(1, "t"), attribute(16, HANDLE)),
    "set-of-unknown-table": do(NEWSET, name(1, "gone"), name(2, "s")),
    "elements-of-unknown-set": elements(NEWSETELEM, "gone", element(1)),
    "flush-of-unknown-set": elements(DELSETELEM, "gone"),
    "destroyed-table": table(26),
    "destroyed-chain": chain(27, "a"),
    "destroyed-rule": rule(28, name(2, "a"), attribute(3, HANDLE)),
    "destroyed-set": set_(29, "s"),
    "destroyed-element": elements(30, "s", element(1)),
    "cut": chain(NEWCHAIN, "c")[:-2],
}


@pytest.mark.parametrize("change", UNTOLD.values(), ids=UNTOLD)
def test_what_a_batch_does_not_tell_is_said(change: bytes) -> None:
    """Names by handle, by number, or unknown here: the sizes are inexact from then on."""
    assert not filled(change).exact


def test_inexact_sizes_stay_so() -> None:
    """Later batches that could be followed do not make up for one that could not."""
    assert not filled(do(DELTABLE, attribute(4, HANDLE)), table(NEWTABLE, "u")).exact


@pytest.mark.parametrize(
    ("family", "number_", "left"), [(IPV4, 1, 2), (IPV6, 3, 2), (INET, 1, 2), (INET, 5, 3), (NETDEV, 0, 3)]
)
def test_a_hook_in_a_delete_only_spares_chains_of_devices(family: int, number_: int, left: int) -> None:
    """`iptables-nft -X` names the hook and the chain is gone; at ingress hooks the chain only loses devices."""
    inventory = Inventory()
    apply_batch(
        inventory,
        batch(
            table(family=family),
            *(chain(NEWCHAIN, each, hook(number_), family=family) for each in "abc"),
            chain(DELCHAIN, "b", hook(number_), family=family),
        ),
    )
    found = inventory.tables[family, "t"]
    assert (len(found.chains), len(found.base)) == (left, left)
    assert inventory.exact


def test_base_chains_are_known_by_name() -> None:
    """A chain with a hook is one, also where it got its hook later; deleted ones are none."""
    inventory = filled(
        chain(NEWCHAIN, "x", hook(1)), chain(NEWCHAIN, "a", hook(2)), chain(NEWCHAIN, "y", hook(3))
    )
    assert inventory.tables[IPV4, "t"].base == {"x", "a", "y"}
    apply_batch(inventory, batch(chain(DELCHAIN, "y")))
    assert inventory.tables[IPV4, "t"].base == {"x", "a"}


@pytest.mark.parametrize(
    ("flush", "left"),
    [
        (do(DELTABLE, family=0), set()),
        (do(DELTABLE, family=IPV4), {(IPV6, "t")}),
        (table(DELTABLE), {(IPV4, "u"), (IPV6, "t")}),
        # nft_flush() takes all families' tables of the name.
        (table(DELTABLE, family=0), {(IPV4, "u")}),
        (table(DELTABLE, "gone"), {(IPV4, "t"), (IPV4, "u"), (IPV6, "t")}),
    ],
    ids=["ruleset", "family", "table", "name-in-all-families", "unknown"],
)
def test_tables_go_with_what_is_in_them(flush: bytes, left: set[tuple[int, str]]) -> None:
    """One table, a family's, all of a name, or all there are."""
    inventory = filled(table(NEWTABLE, "u"), table(family=IPV6), chain(NEWCHAIN, "c", family=IPV6), flush)
    assert inventory.tables.keys() == left
    assert inventory.exact


def test_another_processs_own_table_survives_a_flush() -> None:
    """Only the owner's flush takes an owned table: who asked is not told, so it stays and the sizes are inexact."""
    inventory = filled(table(NEWTABLE, "firewalld", number(2, 2)), chain(NEWCHAIN, "x", of="firewalld"))
    assert inventory.dynamic
    apply_batch(inventory, batch(do(DELTABLE, family=0)))
    assert inventory.tables.keys() == {(IPV4, "firewalld")}
    assert sizes(inventory, of="firewalld") == (1, 0, 0, 0)
    assert not inventory.exact


@pytest.mark.parametrize(
    ("flags", "dynamic"),
    [(0, False), (TIMEOUT, True), (EVAL, True), (0x4, False), (ANONYMOUS | TIMEOUT, False)],
)
def test_sets_that_change_by_themselves_are_known(flags: int, dynamic: bool) -> None:
    """Elements that packets add or that time out are in no batch; anonymous sets belong to their rule."""
    assert filled(set_(NEWSET, "d", flags)).dynamic is dynamic


def test_keys_are_the_same_from_requests_and_dumps() -> None:
    """The flag for nested attributes differs between them, the element does not."""
    inventory = filled()
    take_object(inventory, elements(NEWSETELEM, "s", element(3, nested=0)))
    assert sizes(inventory) == (2, 3, 1, 3)


def test_named_sets_are_listed() -> None:
    """What a dump has to ask for one by one."""
    inventory = filled(table(NEWTABLE, "u"), do(NEWSET, name(1, "u"), name(2, "v")))
    assert list(inventory.named_sets()) == [(IPV4, "t", "s"), (IPV4, "u", "v")]


def test_names_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables, chains and sets beyond the bound are not kept, and the sizes are inexact; what goes makes room."""
    monkeypatch.setattr(objects, "MAX_NAMES", 10)
    every: tuple[Callable[[int], bytes], ...] = (
        lambda n: table(NEWTABLE, f"x{n}"),
        lambda n: chain(NEWCHAIN, f"x{n}", hook(1)),
        lambda n: set_(NEWSET, f"x{n}"),
    )
    for make in every:
        inventory = filled()  # four names
        apply_batch(inventory, batch(*map(make, range(6))))
        assert inventory.exact
        apply_batch(inventory, batch(*map(make, range(2_000))))
        assert not inventory.exact
        assert sum(1 + len(each.chains) + len(each.sets) for each in inventory.tables.values()) == 10
    inventory = filled()
    for n in range(30):
        apply_batch(
            inventory,
            batch(chain(NEWCHAIN, f"c{n}", hook(1)), set_(NEWSET, f"s{n}"), table(NEWTABLE, f"t{n}")),
        )
        apply_batch(
            inventory, batch(chain(DELCHAIN, f"c{n}"), set_(DELSET, f"s{n}"), table(DELTABLE, f"t{n}"))
        )
    assert inventory.exact
    assert inventory.tables[IPV4, "t"].base == set()


def test_elements_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys beyond the bound are not kept, over all sets, and the sizes are inexact; what goes makes room."""
    monkeypatch.setattr(objects, "MAX_ELEMENTS", 10)
    inventory = filled()
    for n in range(30):
        apply_batch(
            inventory, batch(elements(NEWSETELEM, "s", *(element(n * 10 + k) for k in range(10, 17))))
        )
        apply_batch(
            inventory, batch(elements(DELSETELEM, "s", *(element(n * 10 + k) for k in range(10, 17))))
        )
    assert sizes(inventory) == (2, 3, 1, 3)
    for vanish in (elements(DELSETELEM, "s"), set_(DELSET, "s"), table(DELTABLE)):
        inventory = filled(
            vanish, table(), set_(NEWSET, "s"), elements(NEWSETELEM, "s", *map(element, range(10)))
        )
        assert inventory.exact
    inventory = filled(set_(NEWSET, "u"), elements(NEWSETELEM, "u", *map(element, range(1000))))
    assert not inventory.exact
    assert sizes(inventory)[3] == 10


@given(st.binary(max_size=300))
def test_any_bytes_can_be_applied(data: bytes) -> None:
    """Nothing is raised, and no more is found than there can be in so few bytes."""
    inventory = filled()
    apply_batch(inventory, data)
    assert sum(sum(each.counts().values()) for each in inventory.tables.values()) <= 9 + len(data)


pieces = st.one_of(st.binary(max_size=16), st.sampled_from([b"t\0", b"a\0", b"s\0", number(1, 5), bytes(8)]))
attributes_ = st.builds(attribute, st.integers(0, 16) | st.integers(0x8000, 0x8010), pieces)


@settings(deadline=None)  # a busy machine is no failure
@given(
    st.lists(st.tuples(st.integers(0, 33), st.lists(attributes_, max_size=4), st.integers(0, 11)), max_size=8)
)
def test_any_messages_can_be_applied(requests: list[tuple[int, list[bytes], int]]) -> None:
    """Whatever attributes requests have, nothing is raised and no count is negative."""
    inventory = filled()
    apply_batch(
        inventory, batch(*(do(operation, *each, family=family) for operation, each, family in requests))
    )
    for each in inventory.tables.values():
        assert all(count >= 0 for count in each.counts().values())
    assert 0 <= inventory._names == sum(1 + len(t.chains) + len(t.sets) for t in inventory.tables.values())
    assert (
        0
        <= inventory._elements
        == sum(len(s.keys) for t in inventory.tables.values() for s in t.sets.values())
    )


@dataclass
class Kernel:
    """What nf_tables would have after requests, as plain lists, and its answer to a dump."""

    chains: dict[str, list[int]] = field(default_factory=dict)
    base: set[str] = field(default_factory=set)
    sets: dict[str, set[int]] = field(default_factory=dict)

    def step(self, action: str, who: str, value: int) -> Iterable[bytes]:
        """Carry one action out and give its request; nothing where the kernel would refuse."""
        rules = self.chains.get(f"c{who}")
        keys = self.sets.get(f"s{who}")
        match action:
            case "chain":
                self.chains.setdefault(f"c{who}", [])
                yield chain(NEWCHAIN, f"c{who}")
            case "base" if rules is None:
                self.chains[f"c{who}"] = []
                self.base.add(f"c{who}")
                yield chain(NEWCHAIN, f"c{who}", hook(value % 5))
            case "delete-chain" if rules is not None:
                del self.chains[f"c{who}"]
                self.base.discard(f"c{who}")
                yield chain(DELCHAIN, f"c{who}", *[hook(1)] * (value % 2))
            case "rule" if rules is not None:
                rules.append(value)
                yield rule(NEWRULE, name(2, f"c{who}"))
            case "delete-rule" if rules:
                rules.pop()
                yield rule(DELRULE, name(2, f"c{who}"), attribute(3, HANDLE))
            case "flush-chain" if rules is not None:
                rules.clear()
                yield rule(DELRULE, name(2, f"c{who}"))
            case "flush-table":
                for each in self.chains.values():
                    each.clear()
                yield rule(DELRULE)
            case "set":
                self.sets.setdefault(f"s{who}", set())
                yield set_(NEWSET, f"s{who}")
            case "delete-set" if keys is not None:
                del self.sets[f"s{who}"]
                yield set_(DELSET, f"s{who}")
            case "element" if keys is not None:
                keys |= {value, value + 1}
                yield elements(NEWSETELEM, f"s{who}", element(value), element(value + 1))
            case "delete-element" if keys is not None and value in keys:
                keys.discard(value)
                yield elements(DELSETELEM, f"s{who}", element(value))
            case "flush-set" if keys is not None:
                keys.clear()
                yield elements(DELSETELEM, f"s{who}")

    def dump(self) -> Inventory:
        """An inventory from what the kernel lists."""
        inventory = Inventory()
        take_object(inventory, nft(NEWTABLE, name(1, "t")))
        for each in self.chains:
            more = [hook(1)] if each in self.base else []
            take_object(inventory, nft(NEWCHAIN, name(1, "t"), attribute(2, HANDLE), name(3, each), *more))
        for each, rules in self.chains.items():
            for _ in rules:
                take_object(
                    inventory, nft(NEWRULE, name(1, "t"), name(2, each), attribute(3, HANDLE), flags=0x802)
                )
        take_object(inventory, nft(NEWRULE, name(1, "t"), name(2, "__chain7"), flags=0x802))
        for each, keys in self.sets.items():
            take_object(inventory, nft(NEWSET, name(1, "t"), name(2, each), number(3, 0)))
            take_object(
                inventory,
                nft(NEWSETELEM, name(1, "t"), name(2, each), attribute(3, b"".join(map(element, keys)))),
            )
        take_object(inventory, nft(NEWSET, name(1, "t"), name(2, "__set3"), number(3, ANONYMOUS)))
        return inventory


ACTIONS = (
    "chain", "chain", "base", "delete-chain", "rule", "rule", "delete-rule", "flush-chain", "flush-table",
    "set", "delete-set", "element", "element", "delete-element", "flush-set",
)  # fmt: skip


@settings(deadline=None)  # a busy machine is no failure
@given(
    st.lists(
        st.lists(st.tuples(st.sampled_from(ACTIONS), st.sampled_from("abc"), st.integers(0, 9)), max_size=6),
        max_size=8,
    )
)
def test_batches_followed_equal_a_dump(batches: list[list[tuple[str, str, int]]]) -> None:
    """After any batches that tell everything, the inventory that followed them is the one of a dump, and exact."""
    kernel, followed = Kernel(), Inventory()
    apply_batch(followed, batch(table()))
    for actions in batches:
        apply_batch(followed, batch(*(each for action in actions for each in kernel.step(*action))))
    assert followed.exact
    assert state(followed) == state(kernel.dump())
