# SPDX-License-Identifier: Apache-2.0
"""What a run is measured to take, against the kernel's own clock of the same runs untraced."""

import time
from collections.abc import Callable, Iterator
from statistics import median

import pytest

from kptrace.experiments import traffic
from kptrace.experiments.cilium_process import AgentProcess, AgentRequest
from kptrace.experiments.node import EmbeddedNode
from kptrace.experiments.services import make_services
from kptrace.kernel.load import ProgramType
from kptrace.kernel.objects import ProgramInfo, open_program, program_info
from kptrace.kernel.run_statistics import RunStatistics
from kptrace.kernel.test_run import run_program
from kptrace.model.netfilter import IpFamily
from tests.native.objects_bench import closing
from tests.vm.datapath_bench import DatapathBench, cgroups, program, working

pytestmark = [pytest.mark.promised("datapath_lookup", "fentry"), pytest.mark.icount]

RUNS = 997


@pytest.fixture
def bench() -> Iterator[DatapathBench]:
    """The signal, with nothing to measure yet."""
    made = DatapathBench()
    yield made
    assert made.lost() == 0
    made.signal.close()


def test_the_mean_above_the_floor_is_what_the_program_takes(bench: DatapathBench) -> None:
    """Traced and untraced in turn: the mean of the traced runs less the floor is the untraced mean, within a quarter."""
    target = program("cil_from_netdev", ProgramType.SCHED_CLS, working(0, 4000))
    number = program_info(target).id
    untraced, traced = [], []
    with closing(target):
        for _ in range(7):
            with RunStatistics():
                before = program_info(target)
                run_program(target, RUNS)
                after = program_info(target)
            untraced.append((after.run_time_ns - before.run_time_ns) / RUNS)
            bench.mine = {number}
            bench.look()
            # An emulator translates code that is new, which takes a while.
            run_program(target, RUNS)
            seconds = bench.seconds()
            run_program(target, RUNS)
            traced.append((bench.seconds() - seconds) / RUNS * 1e9)
            bench.mine = set()
            bench.look()
        assert bench.count() == 14 * RUNS
    floor = bench.values("kptrace_lookup_floor_seconds")["fentry",] * 1e9
    _assert_same_mean(untraced, [each - floor for each in traced])


def test_ciliums_own_programs(bench: DatapathBench) -> None:
    """The experiments' Cilium with real connections, traced and untraced in turn: every run, and the mean within a quarter.

    The mean of the traced runs is taken less the floor, and while nobody counts runs, which would cost time in them.
    """
    services = make_services(7, 3)
    sources = traffic.client_sources(IpFamily.IPV4)
    chosen = traffic.targets([service.address for service in services], 53)
    untraced, traced = [], []
    labels = {"chain": "from_container", "hook": "tc_ingress"}
    with cgroups(), EmbeddedNode() as node, AgentProcess(node.node, AgentRequest()) as agent:
        agent.install(services)
        number = agent.programs["cil_from_container"]

        def send() -> None:
            assert traffic.tcp_connections(node.client, chosen, sources).total == 53

        for _ in range(5):
            runs, time_ns = _statistics(number, send)
            untraced.append(time_ns / runs)
            bench.mine = set(agent.programs.values())
            bench.look()
            # An emulator translates code that is new, which takes a while.
            _statistics(number, send, lambda: bench.count(**labels))
            count, seconds = bench.count(**labels), bench.seconds(**labels)
            send()
            traced.append((bench.seconds(**labels) - seconds) / (bench.count(**labels) - count) * 1e9)
            bench.mine = set()
            bench.look()
    measured = {row["chain"] for row in bench.rows()}
    assert {"from_container", "to_container", "from_netdev"} <= measured
    # Tail-called programs are a part of the run that called them.
    assert not any("tail" in chain for chain in measured)
    floor = bench.values("kptrace_lookup_floor_seconds")["fentry",] * 1e9
    _assert_same_mean(untraced, [each - floor for each in traced])


def _assert_same_mean(untraced: list[float], net: list[float]) -> None:
    """Within a quarter, beyond what the untraced rounds differ by among themselves.

    With a clock that counts instructions (tools/vm/run.py --icount) those do not differ; without, a machine that is emulated
    stops now and then, and translates again what was attached to.
    """
    mean, difference = median(untraced), abs(median(net) - median(untraced))
    spread = max(untraced) - min(untraced)
    print(
        f"traced less the floor {median(net):.0f} ns, untraced {mean:.0f} ns, of which {spread:.0f} ns vary"
    )
    assert difference <= mean / 4 + spread


def _statistics(
    number: int, run: Callable[[], None], count: Callable[[], int] | None = None
) -> tuple[int, int]:
    """Runs of a program and its run time in ns while something runs, as the kernel counts them.

    Where there is a `count` of our own of the same runs, it is the same, while no packet is under way.
    """
    fd = open_program(number)
    assert fd is not None
    with closing(fd), RunStatistics():
        before = _settled(fd)
        counted = count() if count else 0
        run()
        after = _settled(fd)
        if count:
            assert count() - counted == after.run_count - before.run_count
    return after.run_count - before.run_count, after.run_time_ns - before.run_time_ns


def _settled(program: int) -> ProgramInfo:
    """What the kernel tells of it once it runs no more: the last packets of a connection follow its end."""
    last, now = None, program_info(program)
    while last is None or now.run_count != last.run_count:
        time.sleep(0.3)
        last, now = now, program_info(program)
    return now
