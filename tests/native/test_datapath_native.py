# SPDX-License-Identifier: Apache-2.0
"""The datapath's runs by the kernel's own counts, against bpftool's; and what is said where tracing programs are refused."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kptrace.dataplanes.cilium.detect import Detector
from kptrace.experiments import traffic
from kptrace.experiments.cilium_process import AgentProcess, AgentRequest
from kptrace.experiments.node import EmbeddedNode
from kptrace.experiments.services import make_services
from kptrace.kernel.compile import Compiler
from kptrace.kernel.host import Host
from kptrace.kernel.objects import program_info
from kptrace.kernel.test_run import run_program
from kptrace.model.errors import UnsupportedError
from kptrace.model.metrics import Sample
from kptrace.model.netfilter import IpFamily
from kptrace.model.signal import State
from kptrace.signals.datapath_floor import tracing_refusal
from kptrace.signals.datapath_lookup import DatapathLookup
from kptrace.signals.datapath_lookup import Options as LookupOptions
from kptrace.signals.datapath_statistics import DatapathStatistics, Options
from kptrace.signals.datapath_tracer import REQUEST
from tests.native.bpf_lists import bpftool
from tests.native.lookup_bench import ManualTimers
from tests.native.objects_bench import closing, load, returning

RUNS = 997
CONNECTIONS = 101


class Clock:
    """Seconds in the test's hands."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        """What time it is."""
        return self.now


class Bench:
    """The signal on programs that the test names, and its figures by hook and chain."""

    def __init__(self, **options: Any) -> None:
        self.mine: set[int] = set()
        self.clock = Clock()
        self.timers = ManualTimers()
        self._detector = Detector()
        self.signal = DatapathStatistics(self.timers, Options(**options), self.clock)
        self.signal.start()

    def look(self) -> None:
        """Tell the signal what is there of the test's."""
        seen = self._detector.look()
        own = tuple(found for found in seen.programs if found.info.id in self.mine)
        self.signal.see(replace(seen, programs=own))

    def pass_seconds(self, seconds: float) -> None:
        """Time goes by, and the timers with it."""
        self.clock.now += seconds
        for call in self.timers.calls:
            call()

    def values(self, name: str) -> dict[tuple[str, ...], float]:
        """Samples of a metric by their labels."""
        return {
            sample.labels: sample.value
            for family in self.signal.families()
            if family.spec.name == name
            for sample in family.samples
            if isinstance(sample, Sample)
        }

    def runs(self) -> dict[str, float]:
        """Runs by chain."""
        return {labels[2]: value for labels, value in self.values("kptrace_bpf_program_runs_total").items()}

    def seconds(self) -> dict[str, float]:
        """Run time by chain."""
        found = self.values("kptrace_bpf_program_run_seconds_total")
        return {labels[2]: value for labels, value in found.items()}


@pytest.fixture
def bench() -> Iterator[Bench]:
    """One that counts for a second a minute; its descriptors are closed in the end."""
    before = descriptors()
    made = Bench()
    yield made
    made.signal.close()
    assert descriptors() == before


def descriptors() -> int:
    """How many this process has."""
    return len(list(Path("/proc/self/fd").iterdir()))


def shown(program: int) -> tuple[int, int]:
    """Runs and run time in ns of a program, as bpftool shows them."""
    found = bpftool("prog", "show", "id", str(program))
    return int(found.get("run_cnt", 0)), int(found.get("run_time_ns", 0))


def test_counts_and_mean_are_bpftools(bench: Bench) -> None:
    """Two programs of one kind and one of another: runs and time are the sums of what bpftool shows of each."""
    first, second = (load("cil_from_container", code=returning(0)) for _ in range(2))
    other = load("cil_to_netdev", code=returning(2))
    with closing(first, second, other):
        bench.mine = {program_info(each).id for each in (first, second, other)}
        bench.look()
        run_program(first, RUNS)
        run_program(second, 13)
        run_program(other, 101)
        bench.pass_seconds(1)
        oracle = {each: shown(program_info(each).id) for each in (first, second, other)}
    assert bench.runs() == {"from_container": RUNS + 13, "to_netdev": 101}
    assert oracle[first][0] == RUNS
    times = {"from_container": oracle[first][1] + oracle[second][1], "to_netdev": oracle[other][1]}
    assert bench.seconds() == {chain: pytest.approx(time / 1e9) for chain, time in times.items()}
    assert all(time > 0 for time in times.values())
    assert bench.values("kptrace_bpf_program_observed_seconds_total") == {("bpf_stats",): 1.0}


def test_a_second_a_minute_and_no_more(bench: Bench) -> None:
    """Outside of its second nothing is counted, by nobody: the switch is off."""
    program = load("cil_from_netdev", code=returning(0))
    number = program_info(program).id
    with closing(program):
        bench.mine = {number}
        bench.look()
        run_program(program, 7)
        bench.pass_seconds(1)
        run_program(program, 100)
        assert shown(number)[0] == 7
        bench.pass_seconds(58)
        run_program(program, 100)
        bench.pass_seconds(1)
        run_program(program, 11)
        bench.pass_seconds(1)
        assert shown(number)[0] == 18
    assert bench.runs() == {"from_netdev": 18}


def test_replaced_programs_stay_counted() -> None:
    """Always on: each of 20 programs of one kind takes the place of the one before; the sum is of all, none is kept."""
    bench, before = Bench(always=True), descriptors()
    for _ in range(20):
        program = load("cil_from_netdev", code=returning(0))
        bench.mine = {program_info(program).id}
        bench.look()
        run_program(program, 31)
        bench.pass_seconds(1)
        run_program(program, 10)
        os.close(program)
    bench.mine = set()
    bench.look()
    assert bench.runs() == {"from_netdev": 820}
    assert bench.values("kptrace_bpf_program_observed_seconds_total") == {("bpf_stats",): 20.0}
    bench.signal.close()
    assert descriptors() == before


def test_the_state_says_why_only_a_mean_is_left(bench: Bench) -> None:
    """Degraded, and where tracing programs are refused with what the kernel said; the other mechanism refuses to start."""
    (row,) = bench.signal.states()
    assert (row.state, row.reason) == (State.OFF, "absent")
    program = load("cil_from_netdev", code=returning(0))
    with closing(program):
        bench.mine = {program_info(program).id}
        bench.look()
        (row,) = bench.signal.states()
    refusal = tracing_refusal()
    assert (row.signal, row.mechanism, row.state) == ("datapath_lookup", "bpf_stats", State.DEGRADED)
    assert row.reason == ("tracing_refused" if refusal else "mean_only")
    assert str(refusal or "") in row.detail
    if refusal is None:
        return
    code = Compiler(Path("/sys/kernel/btf/vmlinux"), None).build(REQUEST)
    lookup = DatapathLookup(code, ManualTimers(), Host(), LookupOptions())
    try:
        with pytest.raises(UnsupportedError, match=r"E[A-Z]+"):
            lookup.start()
    finally:
        lookup.close()


def test_ciliums_own_way(tmp_path: Path) -> None:
    """The experiments' Cilium with real connections: found by its names, runs and time as bpftool shows them."""
    services = list(make_services(7, 3))
    with EmbeddedNode() as node:
        agent = AgentProcess(node.node, AgentRequest(cache=tmp_path))
        with agent:
            agent.install(services)
            bench = Bench()
            bench.mine = set(agent.programs.values())
            bench.look()
            chosen = traffic.targets([each.address for each in services if each.address], CONNECTIONS)
            sent = traffic.tcp_connections(node.client, chosen, traffic.client_sources(IpFamily.IPV4))
            assert sent.total == CONNECTIONS
            bench.pass_seconds(1)
            oracle = {name: shown(number) for name, number in agent.programs.items()}
            bench.signal.close()
    counted = {name.removeprefix("cil_"): runs for name, (runs, _) in oracle.items() if "cil_" in name}
    assert bench.runs() == counted
    assert counted["from_container"] >= 2 * CONNECTIONS
    for name, (_, time_ns) in oracle.items():
        if name.startswith("cil_"):
            assert bench.seconds()[name.removeprefix("cil_")] == pytest.approx(time_ns / 1e9)
    # What is tail-called is not counted by itself.
    assert oracle["tail_handle_ipv4"][0] == 0
