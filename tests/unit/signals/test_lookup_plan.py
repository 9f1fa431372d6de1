# SPDX-License-Identifier: Apache-2.0
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kptrace.model.netfilter import BaseChain, ChainType, DataPlane, Hook, IpFamily
from kptrace.signals.lookup_plan import (
    Boundary,
    Bracket,
    Limits,
    Plan,
    PlanDiff,
    diff,
    fixed_priorities,
    plan,
)

INT_MIN, INT_MAX = -(2**31), 2**31 - 1
V4, V6 = IpFamily.IPV4, IpFamily.IPV6


def chain(
    priority: int,
    hook: Hook = Hook.INPUT,
    *,
    table: str = "kube-proxy",
    name: str = "",
    kind: ChainType = ChainType.FILTER,
    dataplane: DataPlane = DataPlane.NFTABLES,
    family: IpFamily = V4,
) -> BaseChain:
    """A base chain, named after its priority unless told otherwise."""
    return BaseChain(family, hook, priority, dataplane, table, name or f"c{priority}", kind)


def nat_chain(priority: int, hook: Hook, name: str = "", family: IpFamily = V4) -> BaseChain:
    """A NAT chain of kube-proxy's table."""
    return chain(priority, hook, name=name, kind=ChainType.NAT, family=family)


def places(planned: Plan) -> list[tuple[int, str, str]]:
    """Each boundary's priority, what it closes and what it opens."""
    return [
        (b.priority, b.closes.chain if b.closes else "", b.opens.chain if b.opens else "")
        for b in planned.boundaries
    ]


def apply(linked: tuple[Boundary, ...], change: PlanDiff) -> set[Boundary]:
    """What is linked after a change."""
    return (set(linked) - set(change.remove)) | set(change.add)


def test_one_chain_is_enclosed_tightly() -> None:
    """The opening is one priority below, the closing one above."""
    planned = plan([chain(0)], {})
    assert places(planned) == [(-1, "", "c0"), (1, "c0", "")]
    (bracket,) = planned.brackets
    assert (bracket.table, bracket.chain, bracket.dataplane) == ("kube-proxy", "c0", DataPlane.NFTABLES)
    assert bracket.members == (("kube-proxy", "c0"),)


def test_consecutive_chains_share_a_boundary() -> None:
    """N brackets with nothing between them need N + 1 programs."""
    assert places(plan([chain(0), chain(50), chain(100)], {})) == [
        (-1, "", "c0"),
        (49, "c0", "c50"),
        (99, "c50", "c100"),
        (101, "c100", ""),
    ]


def test_the_only_free_priority_between_two_chains_closes_and_opens() -> None:
    """Chains at 0 and 2 meet at 1."""
    assert places(plan([chain(0), chain(2)], {})) == [(-1, "", "c0"), (1, "c0", "c2"), (3, "c2", "")]


def test_chains_without_a_free_priority_between_them_are_merged() -> None:
    """The bracket is called after the lowest, its data plane is theirs if they have one in common."""
    planned = plan([chain(0), chain(1), chain(2, dataplane=DataPlane.IPTABLES_NFT, table="t")], {})
    assert places(planned) == [(-1, "", "priority0"), (3, "priority0", "")]
    (bracket,) = planned.brackets
    assert (bracket.table, bracket.dataplane) == ("~shared", DataPlane.OTHER)
    assert bracket.members == (("kube-proxy", "c0"), ("kube-proxy", "c1"), ("t", "c2"))


def test_nat_chains_are_bracketed_where_nat_calls_them() -> None:
    """Declared at -50 and -150, run at -100: one bracket there, none at the declared priorities."""
    planned = plan([nat_chain(-50, Hook.OUTPUT, "a"), nat_chain(-150, Hook.OUTPUT, "b")], {})
    assert places(planned) == [(-101, "", "priority-100"), (-99, "priority-100", "")]
    assert planned.brackets[0].nat


def test_a_filter_chain_at_nats_priority_shares_nats_bracket() -> None:
    """Both run at -100."""
    (bracket,) = plan([nat_chain(-50, Hook.OUTPUT, "a"), chain(-100, Hook.OUTPUT)], {}).brackets
    assert (bracket.table, bracket.chain, bracket.nat) == ("~shared", "priority-100", True)
    assert bracket.dataplane is DataPlane.NFTABLES


def test_conntrack_is_in_no_bracket() -> None:
    """Between raw and mangle, one boundary closes before -200 and another opens behind it."""
    planned = plan([chain(-300, Hook.OUTPUT), chain(-150, Hook.OUTPUT)], {})
    assert places(planned) == [
        (-301, "", "c-300"),
        (-299, "c-300", ""),
        (-151, "", "c-150"),
        (-149, "c-150", ""),
    ]


def test_nats_own_hooks_separate_even_where_no_nat_chain_is() -> None:
    """With a NAT chain at OUTPUT, the family's NAT hook at POSTROUTING exists too."""
    post = [chain(0, Hook.POSTROUTING), chain(150, Hook.POSTROUTING)]
    assert len(plan(post, {}).boundaries) == 3
    planned = plan([*post, nat_chain(-100, Hook.OUTPUT)], {})
    assert [b[0] for b in places(planned)][2:] == [-1, 1, 149, 151]
    other_family = plan([*post, nat_chain(-100, Hook.OUTPUT, family=V6)], {})
    assert len([b for b in other_family.boundaries if b.family is V4]) == 3


def test_others_links_are_stepped_over() -> None:
    """The next free priority is taken, and two chains with nothing free between them are merged."""
    planned = plan([chain(0), chain(3)], {(V4, Hook.INPUT): {-1, 1, 2, 4, 5}})
    assert places(planned) == [(-2, "", "priority0"), (6, "priority0", "")]
    assert places(plan([chain(0)], {(V4, Hook.OUTPUT): {-1}, (V6, Hook.INPUT): {-1}}))[0][0] == -1


@pytest.mark.parametrize("priority", [INT_MIN, INT_MIN + 1, INT_MAX - 1, INT_MAX])
def test_chains_at_the_ends_cannot_be_enclosed(priority: int) -> None:
    """The kernel refuses links at INT_MIN and INT_MAX; other chains are not affected."""
    planned = plan([chain(priority), chain(0)], {})
    assert [(o.chains[0].priority, o.reason) for o in planned.omitted] == [(priority, "no_free_priority")]
    assert places(planned) == [(-1, "", "c0"), (1, "c0", "")]


def test_walk_masks_follow_the_hook_and_the_familys_nat() -> None:
    """Destination NAT is done at PREROUTING and OUTPUT, source NAT at INPUT and POSTROUTING, none at FORWARD."""
    chains = [*(chain(0, hook) for hook in Hook), *(chain(0, hook, family=V6) for hook in Hook)]
    planned = plan([*chains, nat_chain(-100, Hook.OUTPUT)], {})
    masks = {(b.family, b.hook): b.walk_mask for b in planned.brackets}
    assert {hook: masks[V4, hook] for hook in Hook} == {
        Hook.PREROUTING: 0x100,
        Hook.INPUT: 0x80,
        Hook.FORWARD: 0,
        Hook.OUTPUT: 0x100,
        Hook.POSTROUTING: 0x80,
    }
    assert {masks[V6, hook] for hook in Hook} == {0}


def test_service_nat_is_measured_first_where_not_everything_can_be() -> None:
    """Then kube-proxy's and iptables' chains; the others are reported."""
    chains = [
        chain(-5, table="mine"),
        chain(0),
        nat_chain(-100, Hook.OUTPUT),
        chain(10, Hook.FORWARD, dataplane=DataPlane.IPTABLES_NFT, table="filter"),
    ]
    planned = plan(chains, {}, limits=Limits(brackets=2))
    assert {b.chain for b in planned.brackets} == {"c-100", "c0"}
    assert [(o.chains[0].priority, o.reason) for o in planned.omitted] == [
        (10, "max_brackets"),
        (-5, "max_brackets"),
    ]


def test_an_omitted_chain_is_in_nobodys_bracket() -> None:
    """Its neighbours close before and open after it."""
    planned = plan([chain(0), chain(5, table="mine"), chain(10)], {}, limits=Limits(brackets=2))
    assert places(planned) == [(-1, "", "c0"), (1, "c0", ""), (9, "", "c10"), (11, "c10", "")]


def test_a_hook_is_not_filled_up() -> None:
    """The kernel takes 1,024 entries; the writers need some of them."""
    planned = plan([chain(10 * n, table="mine") for n in range(450)], {}, limits=Limits(brackets=1000))
    assert len(planned.boundaries) + 450 <= 896
    assert {o.reason for o in planned.omitted} == {"hook_full"}


def test_foreign_names_are_cut_and_bounded() -> None:
    """32 names are told apart, the others are ~other in brackets of their own; names in use stay."""
    late = [chain(10 * n, table="z", name=f"z{n:02}") for n in range(32)]
    first = plan(late, {})
    early = [chain(10 * n + 1000, table="a" * 100, name=f"a{n:02}") for n in range(10)]
    second = plan([*late, *early, chain(-100)], {}, first.boundaries)
    labels = [(b.table, b.chain) for b in second.brackets]
    assert labels.count(("~other", "~other")) == 10
    assert len({(b.table, b.chain) for b in second.brackets}) == 34
    assert ("kube-proxy", "c-100") in labels
    assert set(second.brackets[5].members) == {("z", "z04")}
    (bracket,) = plan([chain(0, table="ä" * 40, name="b" * 70)], {}).brackets
    assert (bracket.table, bracket.chain) == ("ä" * 32, "b" * 64)


def test_a_bracket_of_ten_thousand_chains_has_few_member_names() -> None:
    """Somebody's many chains at one priority do not grow the series."""
    for table in ("mine", "kube-proxy"):
        (bracket,) = plan([chain(0, table=table, name=f"c{n}") for n in range(10_000)], {}).brackets
        assert len(bracket.chains) == 10_000
        assert len(bracket.members) <= 33


def test_an_unchanged_bracket_keeps_its_links_when_others_come_and_go() -> None:
    """Only what touches the new chain is linked, and its neighbour's closing is linked before the old one goes."""
    old = plan([chain(0)], {})
    new = plan([chain(0), chain(50)], {}, old.boundaries)
    change = diff(old, new)
    assert change.remove == ()
    assert [b.priority for b in change.add] == [51, 49]
    assert change.keep == old.boundaries
    back = plan([chain(0)], {}, new.boundaries)
    assert diff(new, back) == PlanDiff((), (new.boundaries[2], new.boundaries[3]), old.boundaries)


def test_replacing_a_shared_boundary_can_be_done_without_a_gap() -> None:
    """The chain that stays gets its new boundary at another priority than the old one's."""
    old = plan([chain(0), chain(50)], {})
    for stays in ([chain(0)], [chain(50)], [chain(0), chain(25), chain(50)]):
        change = diff(old, plan(stays, {}, old.boundaries))
        assert not {b.priority for b in change.add} & {b.priority for b in change.remove}


def test_a_chain_at_our_priority_moves_the_boundary() -> None:
    """A chain that was registered where our closing is runs before it: they are neighbours now."""
    old = plan([chain(0)], {})
    new = plan([chain(0), chain(1)], {}, old.boundaries)
    assert places(new) == [(-2, "", "priority0"), (2, "priority0", "")]


def test_a_chain_that_joins_a_shared_bracket_relinks_nothing() -> None:
    """The label stays the same, so do the programs; the list of members grows."""
    two = [chain(0, name="a"), chain(0, name="b")]
    old = plan(two, {})
    new = plan([*two, chain(0, name="c")], {}, old.boundaries)
    assert diff(old, new).add == diff(old, new).remove == ()
    assert len(new.brackets[0].members) == 3


def test_a_second_tracer_between_our_brackets_moves_nothing() -> None:
    """Another's link beside ours, or between two brackets, is no reason to unlink; and it finds room beside us."""
    chains = [chain(-150, Hook.OUTPUT), nat_chain(-50, Hook.OUTPUT), chain(0, Hook.OUTPUT)]
    ours = plan(chains, {})
    theirs = plan(chains, {(V4, Hook.OUTPUT): {b.priority for b in ours.boundaries}})
    assert not {b.priority for b in ours.boundaries} & {b.priority for b in theirs.boundaries}
    assert len(theirs.brackets) == 3
    again = plan(chains, {(V4, Hook.OUTPUT): {b.priority for b in theirs.boundaries}}, ours.boundaries)
    assert again == ours


def test_nothing_installed_needs_nothing() -> None:
    """No chains, no links; what was linked is removed."""
    old = plan([chain(0)], {})
    empty = plan([], {(V4, Hook.INPUT): {3}}, old.boundaries)
    assert empty == Plan((), ())
    assert diff(old, empty).remove == old.boundaries


near = st.integers(-8, 8)
priorities = st.one_of(
    near,
    near.map(lambda n: n - 100),
    near.map(lambda n: n - 200),
    near.map(lambda n: n + 100),
    st.integers(INT_MIN, INT_MIN + 4),
    st.integers(INT_MAX - 4, INT_MAX),
)
some_chains = st.lists(
    st.builds(
        BaseChain,
        family=st.sampled_from(IpFamily),
        hook=st.sampled_from([Hook.INPUT, Hook.OUTPUT, Hook.POSTROUTING]),
        priority=priorities,
        dataplane=st.sampled_from([DataPlane.NFTABLES, DataPlane.IPTABLES_NFT]),
        table=st.sampled_from(["kube-proxy", "mine", "x" * 80]),
        chain=st.sampled_from("abcd"),
        type=st.sampled_from(ChainType),
    ),
    max_size=14,
)
some_foreign = st.dictionaries(
    st.tuples(st.sampled_from(IpFamily), st.sampled_from([Hook.INPUT, Hook.OUTPUT])),
    st.frozensets(priorities, max_size=8),
    max_size=3,
)
some_limits = st.builds(
    Limits, brackets=st.integers(0, 12), names=st.integers(0, 3), hook_entries=st.integers(4, 60)
)


def check(
    planned: Plan, chains: list[BaseChain], foreign: dict[tuple[IpFamily, Hook], frozenset[int]]
) -> None:
    """What is true of every plan."""
    inside = [c for b in planned.brackets for c in b.chains] + [c for o in planned.omitted for c in o.chains]
    assert sorted(inside) == sorted(chains)
    for family in IpFamily:
        nat = any(c.family is family and c.type is ChainType.NAT for c in chains)
        for hook in Hook:
            here = [c for c in chains if (c.family, c.hook) == (family, hook)]
            held = {c.effective_priority for c in here} | fixed_priorities(hook, nat=nat)
            held |= foreign.get((family, hook), frozenset())
            boundaries = [b for b in planned.boundaries if (b.family, b.hook) == (family, hook)]
            assert not held & {b.priority for b in boundaries}
            assert all(INT_MIN < b.priority < INT_MAX for b in boundaries)
            assert all(a.priority < b.priority for a, b in pairwise(boundaries))
            check_walk(
                boundaries, here, [b for b in planned.brackets if (b.family, b.hook) == (family, hook)]
            )


def check_walk(boundaries: list[Boundary], chains: list[BaseChain], brackets: list[Bracket]) -> None:
    """A packet's walk through one hook opens and closes each bracket once, and meets exactly its chains within."""
    met: list[BaseChain] = []
    current: Bracket | None = None
    seen: list[Bracket] = []
    events = [(b.priority, b) for b in boundaries] + [(c.effective_priority, c) for c in chains]
    for _, event in sorted(events, key=lambda e: e[0]):
        if isinstance(event, BaseChain):
            met.append(event)
            assert current is None or event in current.chains
            continue
        assert event.closes == current
        assert event.closes is not None or event.opens is not None
        if current is not None:
            assert sorted(met) == sorted(current.chains)
            seen.append(current)
        current, met = event.opens, []
    assert current is None
    assert seen == brackets


@settings(deadline=None)  # a busy machine is no failure
@given(some_chains, some_foreign, some_limits)
def test_every_plan_encloses_exactly_its_chains(
    chains: list[BaseChain], foreign: dict[tuple[IpFamily, Hook], frozenset[int]], limits: Limits
) -> None:
    """Brackets never overlap, every chain is in one or reported, and no boundary is where somebody else is."""
    planned = plan(chains, foreign, limits=limits)
    check(planned, chains, foreign)
    assert len(planned.brackets) <= limits.brackets
    named = {
        (b.table, b.chain)
        for b in planned.brackets
        if b.dataplane is DataPlane.NFTABLES and b.table == "mine"
    }
    assert len(named) <= limits.names


@settings(deadline=None)  # a busy machine is no failure
@given(some_chains, some_foreign, some_limits, some_chains, some_foreign)
def test_every_replan_is_a_good_plan_and_its_difference_leads_there(
    chains: list[BaseChain],
    foreign: dict[tuple[IpFamily, Hook], frozenset[int]],
    limits: Limits,
    others: list[BaseChain],
    later: dict[tuple[IpFamily, Hook], frozenset[int]],
) -> None:
    """Whatever changed, the new plan is right, and linking and unlinking the difference makes it of the old one."""
    old = plan(chains, foreign, limits=limits)
    new = plan([*chains[::2], *others], later, old.boundaries, limits)
    check(new, [*chains[::2], *others], later)
    change = diff(old, new)
    assert apply(old.boundaries, change) == set(new.boundaries)
    assert set(change.keep) == set(old.boundaries) & set(new.boundaries)


@settings(deadline=None)  # a busy machine is no failure
@given(some_chains, some_foreign, some_limits, some_chains, some_foreign)
def test_planning_again_changes_nothing(
    chains: list[BaseChain],
    foreign: dict[tuple[IpFamily, Hook], frozenset[int]],
    limits: Limits,
    others: list[BaseChain],
    later: dict[tuple[IpFamily, Hook], frozenset[int]],
) -> None:
    """With its own links in place the plan is the same, however they came about; the order of chains is nothing."""
    first = plan(chains, foreign, limits=limits)
    assert plan(reversed(chains), foreign, first.boundaries, limits) == first
    second = plan(others, later, first.boundaries, limits)
    assert plan(others, later, second.boundaries, limits) == second


@settings(deadline=None)  # a busy machine is no failure
@given(some_chains, some_foreign)
def test_two_tracers_that_take_turns_come_to_rest(
    chains: list[BaseChain], foreign: dict[tuple[IpFamily, Hook], frozenset[int]]
) -> None:
    """Each sees the other's links as foreign; where both found room for all brackets, neither moves again."""

    def around(other: Plan) -> dict[tuple[IpFamily, Hook], frozenset[int]]:
        held = {place: set(found) for place, found in foreign.items()}
        for b in other.boundaries:
            held.setdefault((b.family, b.hook), set()).add(b.priority)
        return {place: frozenset(found) for place, found in held.items()}

    ours = plan(chains, foreign)
    theirs = plan(chains, around(ours))
    again = plan(chains, around(theirs), ours.boundaries)
    if [b.chains for b in again.brackets] == [b.chains for b in ours.brackets]:
        assert again == ours
        assert plan(chains, around(again), theirs.boundaries) == theirs
