# SPDX-License-Identifier: Apache-2.0
"""The agent's page, and its counts of map operations beside ours."""

from collections.abc import Callable, Iterator
from types import MappingProxyType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kptrace.dataplanes.cilium.detect import Datapath
from kptrace.model.metrics import Sample
from kptrace.model.signal import State
from kptrace.signals.cilium_agent import DIFFERENCE, INFO, OPERATIONS, SCRAPES, CiliumAgentSignal
from kptrace.signals.cilium_agent_page import AgentPage, Comparison, Look, parse
from kptrace.signals.map_write_records import Command, MapWrite

AGENT = 4242
UPDATE = ("lb4_services", "update")
METRICS = """\
# HELP cilium_bpf_map_ops_total Total operations on map, tagged by map name
# TYPE cilium_bpf_map_ops_total counter
cilium_bpf_map_ops_total{map_name="lb4_services_v2",operation="update",outcome="success"} 41
cilium_bpf_map_ops_total{map_name="lb4_services_v2",operation="update",outcome="fail"} 3
cilium_bpf_map_ops_total{map_name="lb4_services_v2",operation="delete",outcome="success"} 2
cilium_bpf_map_ops_total{map_name="policy_v2",operation="update",outcome="success"} 1.2e+03
cilium_bpf_map_ops_total{map_name="policy",operation="update",outcome="success"} 5
cilium_bpf_map_ops_total{map_name="cilium_ct4_global",operation="delete",outcome="success"} 9
cilium_bpf_map_ops_total{map_name="tunnel_map",operation="update",outcome="success"} 4
cilium_bpf_map_ops_total{map_name="lxc",operation="lookup",outcome="success"} 4
cilium_feature_datapath_network{mode="direct-routing"} 0
cilium_feature_datapath_network{mode="overlay-vxlan"} 1
# TYPE cilium_version gauge
cilium_version{arch="amd64",revision="abc",version="1.18.2"} 1
"""


class Never:
    """A loop that calls nothing: the test does what the thread that asks the agent would have done."""

    def call_soon_threadsafe(self, callback: Callable[[], None]) -> None:
        """Forget it."""


def datapath(agent: int | None = AGENT) -> Datapath:
    """Something of Cilium's is there."""
    return Datapath(MappingProxyType({}), (), agent, ("something",))


def write(count: int = 1, command: Command = Command.UPDATE, tgid: int = AGENT, map_: int = 0) -> MapWrite:
    """A call of the agent's, or of somebody else."""
    return MapWrite(1, 2, tgid, tgid, command, map_, 77, 0, count, count, 24, (), truncated=True)


def values(signal: CiliumAgentSignal, name: str) -> dict[tuple[str, ...], float]:
    """The samples of one family."""
    (found,) = [family for family in signal.families() if family.spec.name == name]
    return {each.labels: each.value for each in found.samples if isinstance(each, Sample)}


@pytest.fixture
def signal() -> Iterator[CiliumAgentSignal]:
    """One that nobody answers but the test."""
    made = CiliumAgentSignal(lambda: "", Never(), lambda: {0: "lb4_services", 1: "lxc"}, period=3600)
    yield made
    made.close()


def test_its_page_is_read() -> None:
    """Version, mode, and successful operations by map: without versions of the maps, of those that are known."""
    assert parse(METRICS) == AgentPage(
        "1.18.2",
        "overlay-vxlan",
        {
            UPDATE: 41,
            ("lb4_services", "delete"): 2,
            ("policy", "update"): 1205,
            ("ct4", "delete"): 9,
        },
    )


def test_what_an_agent_does_not_tell_is_left_out() -> None:
    """Other versions lack metrics and labels."""
    assert parse('cilium_version{} 1\ncilium_bpf_map_ops_total{outcome="success"} 1\n') == AgentPage()
    assert parse("") == AgentPage()
    old = 'cilium_bpf_map_ops_total{mapName="cilium_lxc",operation="update",outcome="success"} 7'
    assert parse(old).operations == {("lxc", "update"): 7}


@given(st.text())
def test_any_page_is_read(text: str) -> None:
    """Whatever answers at that port, nothing breaks, and no label becomes long."""
    page = parse(f'{text}\ncilium_version{{version="{text}"}} 1\ncilium_bpf_map_ops_total{{{text}}} {text}\n')
    assert len(page.version) <= 64


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9)), min_size=1))
def test_operations_during_a_look_make_no_difference(steps: list[tuple[int, int, int]]) -> None:
    """Whenever within a look the agent counted, as long as we see all that it does; what we miss shows once all is quiet."""
    comparison, count = Comparison(), 0
    for before, during, after in steps:
        least = count + before
        theirs = least + during
        count = theirs + after
        comparison.look(Look({UPDATE: theirs}, {UPDATE: least}, {UPDATE: count}))
        assert comparison.differences == {UPDATE: 0}
    missed = sum(sum(step) for step in steps) + 1
    quiet = {UPDATE: count}
    comparison.look(Look({UPDATE: count + missed}, quiet, quiet))
    widest = max(steps[0][1] + steps[0][2], 0)
    assert missed - widest <= comparison.differences[UPDATE] <= missed


def test_an_agent_that_starts_anew_begins_anew() -> None:
    """Counts that fall are another process's; a map that appears later is compared from the beginning."""
    comparison = Comparison()
    comparison.look(Look({UPDATE: 50}, {}, {}))
    comparison.look(Look({UPDATE: 53, ("lxc", "update"): 2}, {UPDATE: 1}, {UPDATE: 1}))
    assert comparison.differences == {UPDATE: 2, ("lxc", "update"): 2}
    comparison.look(Look({UPDATE: 3}, {UPDATE: 4}, {UPDATE: 4}))
    assert comparison.differences == {UPDATE: 0}
    comparison.look(Look({UPDATE: 5}, {UPDATE: 9}, {UPDATE: 9}))
    assert comparison.differences == {UPDATE: -3}


def test_looks_become_metrics_and_a_state(signal: CiliumAgentSignal) -> None:
    """Counts of both sides, what is missing, version and mode; writes of others do not count."""
    assert signal.states()[0].reason == "absent"
    assert [family.spec for family in signal.families()] == list(signal.describe())
    signal.seen(datapath())
    for each in (write(), write(tgid=1), write(count=0), write(map_=1), write(map_=9)):
        signal.written(each)
    signal.mark()
    signal.take(AgentPage("1.18.2", "", {UPDATE: 10}), 100)
    signal.settled(99)
    assert values(signal, DIFFERENCE.name) == {}
    signal.settled(100)
    assert values(signal, DIFFERENCE.name) == {UPDATE: 0}
    for each in (write(count=3, command=Command.UPDATE_BATCH), write(command=Command.DELETE)):
        signal.written(each)
    signal.mark()
    signal.take(AgentPage("1.18.2", "", {UPDATE: 15}), 200)
    signal.settled(300)
    assert values(signal, DIFFERENCE.name) == {UPDATE: 2}
    assert values(signal, OPERATIONS.name) == {(*UPDATE, "agent"): 15, (*UPDATE, "kptrace"): 4}
    assert values(signal, INFO.name) == {("cilium", "", "1.18.2"): 1}
    assert signal.states()[0].state is State.ACTIVE
    signal.fail("refused")
    (state,) = signal.states()
    assert (state.state, state.reason, state.detail) == (State.DEGRADED, "unreachable", "refused")
    assert values(signal, SCRAPES.name)[("ok",)] == 2
    signal.seen(datapath(AGENT + 1))
    assert values(signal, DIFFERENCE.name) == {}


def test_an_agent_without_counts_says_so(signal: CiliumAgentSignal) -> None:
    """Its version is told all the same."""
    signal.seen(datapath())
    signal.take(AgentPage("1.18.2"), 100)
    assert signal.states()[0].reason == "not_counted"
    assert values(signal, INFO.name) == {("cilium", "", "1.18.2"): 1}


def test_where_nobody_need_answer_silence_is_no_fault() -> None:
    """With auto a refusal only switches it off."""
    made = CiliumAgentSignal(lambda: "", Never(), dict, optional=True, period=3600)
    made.seen(datapath())
    made.fail("refused")
    (state,) = made.states()
    assert (state.state, state.reason) == (State.OFF, "no_answer")
    made.take(parse(METRICS), 1)
    assert made.states()[0].reason == "no_map_writes"
    assert values(made, OPERATIONS.name)[(*UPDATE, "agent")] == 41
    assert (*UPDATE, "kptrace") not in values(made, OPERATIONS.name)
    made.close()
