# SPDX-License-Identifier: Apache-2.0
"""fentry and fexit at other BPF programs: every run, by program, whatever it was called with and whatever it returns."""

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from kptrace.experiments.netns import Namespace
from kptrace.kernel.attach_datapath import attach_cgroup
from kptrace.kernel.load import AttachType, ProgramType
from kptrace.kernel.test_run import run_program
from kptrace.model.identity import Protocol, ServiceAddress, ServicePort, Snapshot
from tests.native.objects_bench import closing, returning
from tests.vm.datapath_bench import DatapathBench, Lacking, at_loopback, cgroups, program, send

pytestmark = pytest.mark.promised("datapath_lookup", "fentry")

RUNS = 997


@pytest.fixture
def bench() -> Iterator[DatapathBench]:
    """The signal, with nothing to measure yet."""
    made = DatapathBench()
    yield made
    assert made.lost() == 0
    made.signal.close()


@pytest.mark.parametrize(
    ("name", "kind", "hook", "code", "verdict"),
    [
        ("cil_from_container", ProgramType.SCHED_CLS, "tc_ingress", 0, "accept"),
        ("cil_from_container", ProgramType.SCHED_CLS, "tc_ingress", 7, "accept"),
        ("cil_to_netdev", ProgramType.SCHED_CLS, "tc_egress", 2, "drop"),
        ("cil_to_netdev", ProgramType.SCHED_CLS, "tc_egress", -1, "accept"),
        ("cil_xdp_entry", ProgramType.XDP, "xdp", 2, "accept"),
        ("cil_xdp_entry", ProgramType.XDP, "xdp", 1, "drop"),
        ("cil_xdp_entry", ProgramType.XDP, "xdp", 0, "drop"),
    ],
)
def test_every_run_is_counted(
    bench: DatapathBench, name: str, kind: ProgramType, hook: str, code: int, verdict: str
) -> None:
    """997 of 997 runs, under the program's hook and kind, with the verdict that it returned."""
    target = program(name, kind, returning(code))
    with closing(target):
        # It ran before, as programs have by the time that they are found.
        run_program(target, 7)
        bench.add(target)
        bench.look()
        run_program(target, RUNS)
        chain = name.removeprefix("cil_")
        labels = {"hook": hook, "chain": chain, "table": "bpf", "dataplane": "cilium", "walk": "all"}
        assert bench.count(**labels, verdict=verdict) == bench.count() == RUNS


def test_programs_are_told_apart_while_both_run(bench: DatapathBench) -> None:
    """Two programs of different kinds, measured at the same time by the same code: each its own runs."""
    first = program("cil_from_netdev", ProgramType.SCHED_CLS, returning(0))
    second = program("cil_xdp_entry", ProgramType.XDP, returning(2))
    with closing(first, second):
        for each in (first, second):
            bench.add(each)
        bench.look()
        for _ in range(5):
            run_program(first, 101)
            run_program(second, 31)
        assert bench.count(chain="from_netdev") == 505
        assert bench.count(chain="xdp_entry") == 155


def test_packets_have_their_family(bench: DatapathBench, namespace: Namespace, lacking: Lacking) -> None:
    """Datagrams over IPv4 and IPv6 through one program at a device: each family's are counted under it."""
    target = program("cil_from_netdev", ProgramType.SCHED_CLS, returning(-1))
    attached = at_loopback(namespace, target, lacking)
    with closing(target, attached):
        bench.add(target)
        bench.look()
        before = {family: bench.count(family=family) for family in ("ipv4", "ipv6")}
        namespace.call(lambda: send(socket.AF_INET, 101))
        namespace.call(lambda: send(socket.AF_INET6, 53))
        # The kernel itself sends a few over IPv6.
        assert bench.count(family="ipv4") - before["ipv4"] == 101
        assert 53 <= bench.count(family="ipv6") - before["ipv6"] <= 58


def test_connects_are_counted_by_service(bench: DatapathBench, namespace: Namespace) -> None:
    """connect() to two Services, over IPv4 and by a mapped address: counted by the address that the caller gave."""
    here, there = (ServicePort("shop", name, "http", Protocol.TCP) for name in ("here", "there"))
    addresses = {
        ServiceAddress("127.0.0.7", 8080, Protocol.TCP): here,
        ServiceAddress("127.0.0.8", 8080, Protocol.TCP): there,
        ServiceAddress("::1", 8080, Protocol.TCP): there,
    }
    bench.signal.set_identity(Snapshot(services=addresses))
    four = program("cil_sock4_connect", ProgramType.CGROUP_SOCK_ADDR, returning(1))
    six = program("cil_sock6_connect", ProgramType.CGROUP_SOCK_ADDR, returning(1))
    with ExitStack() as stack:
        root = os.open(stack.enter_context(cgroups()), os.O_RDONLY)
        four_link = attach_cgroup(four, root, AttachType.CGROUP_INET4_CONNECT)
        six_link = attach_cgroup(six, root, AttachType.CGROUP_INET6_CONNECT)
        stack.enter_context(closing(root, four, six, four_link, six_link))
        bench.add(four)
        bench.add(six)
        bench.look()

        def connect() -> None:
            for family, address, times in (
                (socket.AF_INET, "127.0.0.7", 23),
                (socket.AF_INET, "127.0.0.8", 5),
                (socket.AF_INET, "127.0.0.9", 3),
                (socket.AF_INET6, "::ffff:127.0.0.7", 11),
                (socket.AF_INET6, "::1", 7),
            ):
                for _ in range(times):
                    with socket.socket(family, socket.SOCK_STREAM) as client, pytest.raises(OSError):
                        client.connect((address, 8080))

        namespace.call(connect)
        assert bench.count(chain="sock4_connect", hook="cgroup_connect", family="ipv4", walk="first") == 31
        assert bench.count(chain="sock6_connect", hook="cgroup_connect", family="ipv6", walk="first") == 18
        assert bench.lost() == 0  # all timers have their turn: the busiest Services are chosen
        rows = bench.rows("kptrace_service_lookup_duration_seconds")
        named = {row["service_name"]: row["count"] for row in rows}
        assert named == {"here": 34, "there": 12}
