# SPDX-License-Identifier: Apache-2.0
"""What the datapath's maps hold becomes metrics: labels, sums, losses, states; and the run counts of replaced programs."""

import re
from array import array
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kptrace.kernel.histogram import slot_of
from kptrace.kernel.load import ProgramType
from kptrace.kernel.objects import ProgramInfo
from kptrace.model.errors import UnsupportedError
from kptrace.model.metrics import HistogramSample, MetricFamily, Sample
from kptrace.model.signal import MechanismState, State
from kptrace.signals import datapath_cells as cells
from kptrace.signals.datapath_cells import Group
from kptrace.signals.datapath_families import SPECS, Programs, Published, judge, own_families, run_families
from kptrace.signals.datapath_targets import Target
from kptrace.signals.datapath_totals import RunTotals
from kptrace.signals.datapath_tracer import PAIRS, Hole, Kind, holes
from kptrace.signals.lookup_cells import COUNT_KINDS, SUM_WORD, WORDS

SOURCE = Path(__file__).parents[3] / "bpf/program_run.bpf.c"
FROM, CONNECT = Group("tc_ingress", "from_container"), Group("cgroup_connect", "sock4_connect")
GROUPS = {FROM: 0, CONNECT: 1}


def target(number: int, group: Group = FROM, kind: int = 3, family: str = "") -> Target:
    """A program of a group."""
    return Target(number, kind, 1, 2, group.chain, group.hook, family, 3, number)


def memory_of(counted: Mapping[tuple[int, int, int], int]) -> memoryview:
    """The map `cells`, with a number of runs under each group, cell and duration in ns."""
    words = array("Q", bytes(cells.GROUPS * cells.GROUP_BYTES))
    for (group, cell, duration), count in counted.items():
        base = (group * cells.CELLS_PER_GROUP + cell) * WORDS
        words[base + slot_of(duration)] += count
        words[base + SUM_WORD] += count * duration
    return memoryview(words.tobytes())


def counts_of(counted: Mapping[tuple[int, int], int]) -> memoryview:
    """The map `counts`, with losses by group and kind."""
    words = array("Q", bytes(cells.GROUPS * COUNT_KINDS * 8))
    for (group, kind), count in counted.items():
        words[group * COUNT_KINDS + kind] = count
    return memoryview(words.tobytes())


def by_name(families: "list[MetricFamily]") -> dict[str, MetricFamily]:
    """The families by name; every one is among those that are described."""
    found = {family.spec.name: family for family in families}
    assert found.keys() <= {spec.name for spec in SPECS}
    for family in found.values():
        assert len({sample.labels for sample in family.samples}) == len(family.samples)
        assert all(len(sample.labels) == len(family.spec.labels) for sample in family.samples)
    return found


SEEN = Published(
    MechanismState("datapath_lookup", "fentry", State.ACTIVE),
    Programs((target(1), target(2)), (target(3),), (target(4, CONNECT),)),
    {"tc_ingress": 5},
    80e-9,
    (1.0, 1 / 64),
)


def test_a_run_is_under_its_hook_kind_family_and_verdict() -> None:
    """Cells become label values; only connects are known to be first packets; no label names an endpoint."""
    memory = memory_of({(0, 0, 100): 3, (0, 3, 1000): 2, (1, 0, 700): 5})
    samples = by_name(list(run_families(SEEN, memory, counts_of({}), GROUPS)))[
        "kptrace_lookup_duration_seconds"
    ].samples
    shown = {}
    for sample in samples:
        assert isinstance(sample, HistogramSample)
        shown[sample.labels] = (sample.count, sample.sum)
    fixed = ("fentry", "cilium")
    assert shown == {
        (*fixed, "ipv4", "tc_ingress", "bpf", "from_container", "all", "none", "accept", "host"): (3, 300e-9),
        (*fixed, "ipv6", "tc_ingress", "bpf", "from_container", "all", "none", "drop", "host"): (2, 2e-6),
        (*fixed, "ipv4", "cgroup_connect", "bpf", "sock4_connect", "first", "none", "accept", "host"): (
            5,
            pytest.approx(3.5e-6),
        ),
    }


def test_losses_are_told_by_hook_and_reason() -> None:
    """Those that the programs counted, and those that the kernel did; zero is told too, queueing is netfilter's."""
    losses = by_name(list(run_families(SEEN, memory_of({}), counts_of({(0, 2): 7, (1, 3): 1}), GROUPS)))[
        "kptrace_lookup_unpaired_total"
    ]
    shown = {sample.labels: sample.value for sample in losses.samples if isinstance(sample, Sample)}
    assert shown["tc_ingress", "evicted"] == 7
    assert shown["cgroup_connect", "opened_elsewhere"] == 1
    assert shown["tc_ingress", "recursion_miss"] == 5
    assert shown["cgroup_connect", "recursion_miss"] == shown["tc_ingress", "stolen_or_in_flight"] == 0
    assert not any(reason == "queued" for _, reason in shown)


def test_programs_are_counted_by_state() -> None:
    """What is measured, what waits and what was refused, by hook and chain."""
    families = by_name(list(own_families(SEEN)))
    programs = {sample.labels: sample.value for sample in families["kptrace_lookup_programs"].samples}  # type: ignore[union-attr]
    assert programs == {
        ("cilium", "tc_ingress", "from_container", "measured"): 2,
        ("cilium", "tc_ingress", "from_container", "waiting"): 1,
        ("cilium", "cgroup_connect", "sock4_connect", "refused"): 1,
    }
    assert families["kptrace_lookup_floor_seconds"].samples == [Sample(("fentry",), 80e-9)]


@pytest.mark.parametrize(
    ("programs", "attached", "state", "reason"),
    [
        (Programs(), True, State.OFF, "absent"),
        (Programs((target(1),)), True, State.ACTIVE, "ok"),
        (Programs((target(1),), (target(2),)), True, State.ACTIVE, "rotating"),
        (Programs((target(1),), (), (target(2),)), True, State.DEGRADED, "attach_refused"),
        (Programs((), (), (target(2),)), True, State.UNAVAILABLE, "attach_refused"),
        (Programs((target(1),)), False, State.OFF, "over_budget"),
    ],
)
def test_the_state_says_how_far_it_is_measured(
    programs: Programs, attached: bool, state: State, reason: str
) -> None:
    """Each way in which not all is measured has a reason, and a refusal is quoted."""
    row = judge(programs, "EBUSY", attached=attached)
    assert (row.state, row.reason) == (state, reason)
    assert ("EBUSY" in row.detail) == (reason == "attach_refused")


def test_the_mean_is_of_all_cells() -> None:
    """The floor is the mean of whatever families and verdicts were counted."""
    memory = memory_of({(2, 0, 100): 1, (2, 5, 200): 3})
    assert cells.mean_ns(cells.group_words(memory, 2)) == 175
    assert cells.mean_ns(cells.group_words(memory, 3)) is None


def test_a_group_keeps_its_number() -> None:
    """Cells never belong to another group."""
    numbers = cells.GroupNumbers()
    assert [numbers.number(group) for group in (FROM, CONNECT, FROM)] == [0, 1, 0]


def test_what_a_pair_is_filled_with() -> None:
    """By the type of the program and where it is called."""
    packet = holes(target(1), 9)
    assert (packet[Hole.GROUP], packet[Hole.KIND], packet[Hole.FAMILY]) == (9, Kind.PACKET, 3)
    assert (packet[Hole.WALK], packet[Hole.NAMED]) == (1, 0)
    frame = holes(target(1, Group("xdp", "xdp_entry"), ProgramType.XDP), 0)
    assert (frame[Hole.KIND], frame[Hole.FAMILY]) == (Kind.FRAME, 3)
    call = holes(target(1, CONNECT, ProgramType.CGROUP_SOCK_ADDR, "ipv6"), 0)
    assert (call[Hole.KIND], call[Hole.FAMILY], call[Hole.WALK], call[Hole.NAMED]) == (Kind.CALL, 1, 0, 6)
    release = holes(target(1, Group("cgroup_sock_release", "sock_release"), 9), 0)
    assert (release[Hole.KIND], release[Hole.FAMILY], release[Hole.NAMED]) == (Kind.CALL, 2, 0)
    with pytest.raises(UnsupportedError):
        holes(target(1, FROM, 1), 0)


def test_the_source_has_the_same_numbers() -> None:
    """Enumerations and sizes of the C source are those that the loader and the reader go by."""
    text = SOURCE.read_text()

    def enumerators(first: str) -> list[str]:
        match = re.search(rf"enum {{ ({first}[^}}]*) }}", text)
        assert match
        return match[1].split(", ")

    def macro(name: str) -> int:
        match = re.search(rf"#define {name} (\d+)", text)
        assert match
        return int(match[1])

    assert enumerators("GROUP") == [hole.name for hole in Hole]
    assert enumerators("KIND_PACKET") == [f"KIND_{kind.name}" for kind in Kind]
    assert enumerators("FAMILY_IPV4") == [
        *(f"FAMILY_{name.upper()}" for name in cells.FAMILIES),
        "FAMILY_BY_PACKET",
    ]
    sizes = (macro("OWNERS"), macro("CELLS_PER_GROUP"), macro("PAIRS"))
    assert sizes == (cells.GROUPS, cells.CELLS_PER_GROUP, PAIRS)


def info(number: int, runs: int, time_ns: int) -> ProgramInfo:
    """What the kernel tells of a program."""
    return ProgramInfo(number, 3, "cil_from_contai", "00", 1, (1,), (), time_ns, runs, 0, 0)


def test_runs_of_replaced_programs_stay_counted() -> None:
    """What ran before counting began is nobody's; a program that came meanwhile counts whole."""
    totals = RunTotals()
    totals.learn({1: info(1, 1000, 5000)})
    totals.add({1: FROM}, {1: info(1, 1007, 5070)})
    totals.add({1: FROM, 2: FROM}, {1: info(1, 1010, 5100), 2: info(2, 5, 50)})
    totals.keep([2])
    totals.add({2: FROM}, {2: info(2, 6, 60)})
    seconds, runs, observed = totals.families(2.5)
    labels = ("cilium", "tc_ingress", "from_container", "bpf_stats")
    assert runs.samples == [Sample(labels, 16.0)]
    assert seconds.samples == [Sample(labels, pytest.approx(160e-9))]
    assert observed.samples == [Sample(("bpf_stats",), 2.5)]


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 50), st.integers(0, 9)), max_size=40))
def test_totals_never_go_back(gains: list[tuple[int, int, int]]) -> None:
    """Whatever programs gain, come and go, a total only grows, and by just what they gained."""
    totals, kernel = RunTotals(), dict.fromkeys(range(1, 5), (0, 0))
    groups, gained = dict.fromkeys(range(1, 5), FROM), 0
    for number, runs, each in gains:
        before = kernel[number]
        kernel[number] = before[0] + runs, before[1] + runs * each
        gained += runs
        totals.add(groups, {number: info(number, *kernel[number])})
        assert totals.totals[FROM].runs == gained
    assert sum(time for _, time in kernel.values()) == sum(t.run_time_ns for t in totals.totals.values())
