# SPDX-License-Identifier: Apache-2.0
"""From an agent's single writes to who is reachable, and since which write."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kptrace.dataplanes.cilium.layout_table import LAYOUTS
from kptrace.dataplanes.cilium.layouts import Role
from kptrace.dataplanes.cilium.service_effect import Effect, Frontend
from kptrace.dataplanes.cilium.service_map import (
    Backend,
    ServiceFlag,
    ServiceKey,
    ServiceValue,
    encode_backend,
    encode_backend_id,
    encode_service_key,
    encode_service_value,
)
from kptrace.dataplanes.cilium.service_state import FAMILY_OF, ServiceState
from kptrace.experiments.cilium_layouts import Version
from kptrace.model.identity import Endpoint, Protocol, ServiceAddress
from kptrace.model.netfilter import IpFamily
from tests.unit.dataplanes.cilium.agent import Agent, changes_at, layouts_of

WEB = ServiceAddress("10.96.0.10", 80, Protocol.TCP)
DNS = ServiceAddress("10.96.0.53", 53, Protocol.UDP)
SIX = ServiceAddress("fd00::10", 80, Protocol.TCP)
A, B, C = (("10.0.0.1", 8080), ("10.0.0.2", 8080), ("10.0.0.3", 8080))
ENDPOINTS = st.builds(
    Endpoint,
    ip=st.integers(1, 6).map("10.0.0.{}".format),
    port=st.just(8080),
    ready=st.booleans(),
    terminating=st.booleans(),
)
STEPS = st.lists(
    st.tuples(
        st.sampled_from([WEB, DNS, SIX]),
        st.none() | st.lists(ENDPOINTS, max_size=6, unique_by=lambda each: each.ip),
    ),
    min_size=1,
    max_size=12,
)


def at(address: ServiceAddress, endpoints: list[Endpoint]) -> list[Endpoint]:
    """Endpoints of the address's own family."""
    return [
        each._replace(ip=each.ip.replace("10.0.0.", "fd00::a:") if ":" in address.ip else each.ip)
        for each in endpoints
    ]


def wanted(endpoints: list[Endpoint]) -> set[tuple[str, int]]:
    """Those that the agent sends to: the ready ones, or those that go and still serve if there are no others."""
    ready = {(each.ip, each.port) for each in endpoints if each.ready and not each.terminating}
    return ready or {(each.ip, each.port) for each in endpoints if each.terminating and each.serving}


@settings(max_examples=150)
@given(st.sampled_from([Version.CURRENT, Version.OLDER]), STEPS)
def test_an_agents_writes_are_told_once_each_and_end_with_what_was_wanted(
    version: Version, steps: list[tuple[ServiceAddress, list[Endpoint] | None]]
) -> None:
    """In both documented orders: who is added becomes reachable once, who is removed goes once, who stays is not told.

    Never is anybody told reachable whom the datapath does not find at that moment, nor the reverse.
    """
    agent = Agent(version)
    known: dict[ServiceAddress, set[tuple[str, int]]] = {}
    for address, endpoints in steps:
        if endpoints is None and address not in known:
            continue
        after = at(address, endpoints) if endpoints is not None else None
        effects = agent.remove(address) if after is None else agent.update(address, after)
        before = known.pop(address, None)
        now = wanted(after) if after is not None else set()
        told = set(before or ())
        added: Counter[tuple[str, int]] = Counter()
        removed: Counter[tuple[str, int]] = Counter()
        came = went = 0
        for effect in effects:
            for change in effect.changes:
                assert change.frontend[:2] == (address.ip, address.port)
                reached = agent.reached(address)
                assert change.added <= reached
                assert not change.removed & reached
                assert not change.added & told
                assert change.removed <= told
                assert change.added or change.removed or change.appeared or change.vanished
                told = (told | change.added) - change.removed
                assert change.endpoints == told
                came, went = came + change.appeared, went + change.vanished
                added.update(change.added)
                removed.update(change.removed)
            assert agent.reached(address) <= told
            assert agent.state.endpoints(address) == told
        assert told == now == agent.state.endpoints(address) == agent.reached(address)
        assert (came, went) == (before is None, after is None)
        old = before or set()
        assert all(added[each] == 1 and removed[each] == 0 for each in now - old)
        assert all(removed[each] == 1 and added[each] == 0 for each in old - now)
        assert all(added[each] == removed[each] == 0 for each in now & old)
        # Who only goes may be in a slot that is still counted for the moment until the master entry is written.
        assert added.keys() - now == removed.keys() - old
        if after is not None:
            known[address] = now
        assert agent.state.present(address) is (after is not None)


@settings(max_examples=50)
@given(st.sampled_from([Version.CURRENT, Version.OLDER]), STEPS, st.permutations(list(FAMILY_OF)))
def test_what_is_loaded_is_what_the_writes_would_have_made(
    version: Version, steps: list[tuple[ServiceAddress, list[Endpoint] | None]], order: list[Role]
) -> None:
    """In whatever order the four maps are read, also again; and it goes on from there."""
    agent = Agent(version)
    fresh = ServiceState(agent.layouts)
    for address, endpoints in steps:
        if endpoints is not None:
            list(agent.update(address, at(address, endpoints)))
        elif address in agent.table.addresses:
            list(agent.remove(address))
        for role in order:
            fresh.load(role, list(agent.maps[role].items()))
        for each in (WEB, DNS, SIX):
            assert fresh.endpoints(each) == agent.state.endpoints(each)
            assert fresh.present(each) == agent.state.present(each)
        for family in IpFamily:
            assert set(fresh.frontends(family)) == set(agent.state.frontends(family))
    agent.state = fresh
    list(agent.update(WEB, [Endpoint("10.0.0.9", 1)]))
    assert fresh.endpoints(WEB) == {("10.0.0.9", 1)}


class Maps:
    """Writes entries of the IPv4 maps by hand."""

    def __init__(self) -> None:
        self.layouts = layouts_of(Version.CURRENT)
        self.state = ServiceState(self.layouts)

    def backend(self, number: int, where: tuple[str, int] | None) -> Effect:
        """Write or (None) delete a back end."""
        layout = self.layouts[Role.LB4_BACKENDS]
        key = encode_backend_id(layout, number)
        if where is None:
            return self.state.delete(Role.LB4_BACKENDS, key)
        return self.state.write(Role.LB4_BACKENDS, key, encode_backend(layout, Backend(*where)))

    def service(
        self, slot: int, value: ServiceValue | None, *, protocol: int = 6, scope: int = 0, port: int = 80
    ) -> Effect:
        """Write or (None) delete an entry of WEB."""
        layout = self.layouts[Role.LB4_SERVICES]
        key = encode_service_key(layout, ServiceKey(WEB.ip, port, protocol, slot, scope))
        if value is None:
            return self.state.delete(Role.LB4_SERVICES, key)
        return self.state.write(Role.LB4_SERVICES, key, encode_service_value(layout, value))

    def slot(self, slot: int, backend: int | None, *, scope: int = 0, protocol: int = 6) -> Effect:
        """Write or (None) delete a slot."""
        value = None if backend is None else ServiceValue(backend_id=backend)
        return self.service(slot, value, scope=scope, protocol=protocol)

    def master(self, count: int | None, flags: int = 0, *, scope: int = 0, protocol: int = 6) -> Effect:
        """Write or (None) delete the master entry."""
        value = None if count is None else ServiceValue(count, flags=flags)
        return self.service(0, value, scope=scope, protocol=protocol)


def added(effect: Effect) -> set[tuple[str, int]]:
    """Who became reachable."""
    return {each for change in effect.changes for each in change.added}


def removed(effect: Effect) -> set[tuple[str, int]]:
    """Who is not reachable any more."""
    return {each for change in effect.changes for each in change.removed}


@pytest.fixture
def maps() -> Maps:
    """WEB with the endpoint A, and B's back end entry."""
    made = Maps()
    made.backend(1, A)
    made.backend(2, B)
    made.slot(1, 1)
    made.master(1)
    assert made.state.endpoints(WEB) == {A}
    return made


def test_the_master_entry_makes_a_new_slot_reachable(maps: Maps) -> None:
    """A slot beyond the count is nothing, whatever it says."""
    assert not maps.slot(2, 2)
    effect = maps.master(2)
    assert added(effect) == {B}
    (change,) = effect.changes
    assert (change.appeared, change.vanished, change.present) == (False, False, True)
    assert change.endpoints == {A, B}
    assert not maps.master(2)


def test_a_slot_that_is_rewritten_in_place_is_reachable_at_once(maps: Maps) -> None:
    """The count covers it; who was there before goes with the next master entry."""
    assert added(effect := maps.slot(1, 2)) == {B}
    assert removed(effect) == set()
    assert removed(maps.master(1)) == {A}
    assert maps.state.endpoints(WEB) == {B}


def test_without_its_back_end_nobody_is_reachable(maps: Maps) -> None:
    """A slot may come first; the back end's entry then is the write that completes it, for all frontends at once."""
    maps.slot(2, 3)
    maps.slot(2, 3, protocol=17)
    maps.slot(1, 1, protocol=17)
    maps.master(2, protocol=17)
    assert not maps.master(2)
    effect = maps.backend(3, C)
    assert added(effect) == {C}
    assert {change.frontend for change in effect.changes} == {
        Frontend(WEB.ip, 80, 6),
        Frontend(WEB.ip, 80, 17),
    }
    assert not maps.backend(3, C)


def test_a_back_end_that_is_deleted_first_goes_with_the_master_entry(maps: Maps) -> None:
    """Newer agents delete it before the slots that name it; until these are rewritten, packets still go there."""
    maps.slot(2, 2)
    maps.master(2)
    assert not maps.backend(2, None)
    assert not maps.slot(2, 2)
    assert not maps.master(2)
    assert maps.state.endpoints(WEB) == {A, B}
    assert removed(maps.master(1)) == {B}
    assert not maps.slot(2, None)


def test_a_slot_that_names_a_deleted_back_end_leads_nowhere(maps: Maps) -> None:
    """Though another service's slots still name it, and its address is known: it was never reachable here."""
    maps.backend(1, None)
    assert not maps.slot(1, 1, protocol=17)
    (change,) = maps.master(1, protocol=17).changes
    assert (change.appeared, change.added, change.endpoints) == (True, set(), set())
    assert not maps.master(0, protocol=17)
    maps.master(1, protocol=17)
    (change,) = maps.backend(1, A).changes
    assert (change.frontend, change.added) == (Frontend(WEB.ip, 80, 17), {A})


def test_a_back_end_that_comes_back_is_not_told_twice(maps: Maps) -> None:
    """It was never taken out of the service."""
    assert not maps.backend(1, None)
    assert not maps.backend(1, A)
    assert not maps.master(1)


def test_an_id_that_gets_another_address_leads_there(maps: Maps) -> None:
    """The slots need no write for that."""
    assert added(maps.backend(1, C)) == {C}
    assert removed(maps.master(1)) == {A}
    assert maps.state.endpoints(WEB) == {C}


def test_a_state_alone_changes_nothing(maps: Maps) -> None:
    """A terminating back end is used for as long as the master entry counts its slot."""
    layout = maps.layouts[Role.LB4_BACKENDS]
    value = encode_backend(layout, Backend(*A, state=1))
    assert not maps.state.write(Role.LB4_BACKENDS, encode_backend_id(layout, 1), value)
    assert maps.state.endpoints(WEB) == {A}


def test_without_its_master_entry_an_address_is_gone_and_all_endpoints_with_it(maps: Maps) -> None:
    """Slots that are left are nothing; deleted a second time, nothing is told."""
    (change,) = maps.master(None).changes
    assert (change.appeared, change.vanished, change.present) == (False, True, False)
    assert change.removed == {A}
    assert not maps.slot(1, None)
    assert not maps.master(None)
    (change,) = maps.master(0).changes
    assert change.appeared
    assert not change.endpoints
    assert maps.state.present(WEB)


def test_two_back_ends_with_one_address_are_one_endpoint(maps: Maps) -> None:
    """It goes with the last of them."""
    maps.backend(3, A)
    maps.slot(2, 3)
    assert not maps.master(2)
    maps.slot(1, 3)
    assert not maps.master(1)
    assert removed(maps.master(0)) == {A}


def test_traffic_inside_finds_scope_1_where_there_are_two(maps: Maps) -> None:
    """Whoever is only in scope 0 then is not reachable from inside."""
    flags = ServiceFlag.NODEPORT | ServiceFlag.TWO_SCOPES
    assert not maps.slot(1, 2, scope=1)
    assert not maps.master(1, flags, scope=1)
    (change,) = maps.master(1, flags).changes
    assert (change.added, change.removed) == ({B}, {A})
    assert change.flags == flags
    assert not maps.slot(1, 3)
    assert not maps.backend(3, C)
    assert added(maps.slot(1, 3, scope=1)) == {C}
    assert removed(maps.master(1, flags, scope=1)) == {B}
    assert maps.state.endpoints(WEB) == {C}
    maps.slot(1, 1)
    (change,) = maps.master(1).changes
    assert (change.added, change.removed) == ({A}, {C})


def test_older_agents_say_by_the_policy_that_there_are_two_scopes(maps: Maps) -> None:
    """Newer ones set that flag too where both scopes are the same, and then there is one entry only."""
    assert not maps.master(1, ServiceFlag.EXT_LOCAL_SCOPE)
    maps.slot(1, 2, scope=1)
    (change,) = maps.master(1, scope=1).changes
    assert (change.added, change.removed) == ({B}, {A})
    (change,) = maps.master(None, scope=1).changes
    assert (change.added, change.removed) == ({A}, {B})


def test_two_scopes_without_the_second_are_nothing(maps: Maps) -> None:
    """The datapath does not go back to the first one."""
    (change,) = maps.master(1, ServiceFlag.TWO_SCOPES).changes
    assert change.vanished
    assert change.removed == {A}
    maps.slot(1, 1, scope=1)
    (change,) = maps.master(1, ServiceFlag.TWO_SCOPES, scope=1).changes
    assert change.appeared
    assert change.added == {A}


def test_a_service_for_any_protocol_answers_for_each(maps: Maps) -> None:
    """As they all did before 1.17; one for its own protocol is found first."""
    maps.slot(1, 2, protocol=0)
    maps.master(1, protocol=0)
    assert maps.state.endpoints(ServiceAddress(WEB.ip, WEB.port, Protocol.UDP)) == {B}
    assert maps.state.endpoints(WEB) == {A}


def test_the_drop_entry_for_all_other_ports_is_no_service(maps: Maps) -> None:
    """Newer agents write one beside a load balancer's address."""
    assert not maps.service(0, ServiceValue(), protocol=0, port=0)
    assert set(maps.state.frontends(IpFamily.IPV4)) == {Frontend(WEB.ip, 80, 6)}
    assert not maps.service(0, None, protocol=0, port=0)


def test_families_need_both_their_maps() -> None:
    """Of a family whose back ends have an unknown layout nothing can be told; its roles are refused."""
    layouts = layouts_of(Version.CURRENT)
    del layouts[Role.LB6_BACKENDS]
    state = ServiceState(layouts)
    assert state.families == {IpFamily.IPV4}
    with pytest.raises(KeyError):
        state.delete(Role.LB6_BACKENDS, bytes(4))


def test_entries_of_another_size_are_refused_and_change_nothing(maps: Maps) -> None:
    """What was cut on its way is not taken for something else."""
    for role in (Role.LB4_SERVICES, Role.LB4_BACKENDS):
        with pytest.raises(ValueError, match="bytes where the layout has"):
            maps.state.write(role, b"short", b"short")
        with pytest.raises(ValueError, match="bytes where the layout has"):
            maps.state.delete(role, b"short")
    assert maps.state.endpoints(WEB) == {A}


def test_one_to_many_back_ends_is_one_effect_each() -> None:
    """As an agent adds them one by one: with the slot's write where it sorts before others, else the master entry's."""
    agent = Agent()
    list(agent.update(WEB, [Endpoint("10.0.1.1", 80)]))
    for count in range(2, 45):
        endpoints = [Endpoint(f"10.0.1.{number}", 80) for number in range(1, count + 1)]
        (effect,) = [each for each in agent.update(WEB, endpoints) if each]
        assert added(effect) == {(f"10.0.1.{count}", 80)}
        assert len(changes_at(effect, WEB)) == 1


def test_every_layout_that_is_needed_is_there() -> None:
    """For both families, in both versions."""
    for version in (Version.CURRENT, Version.OLDER):
        assert ServiceState(layouts_of(version)).families == set(IpFamily)
    assert {layout.role for layout in LAYOUTS} >= set(FAMILY_OF)
