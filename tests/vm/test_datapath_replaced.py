# SPDX-License-Identifier: Apache-2.0
"""Programs that are replaced while they are measured: each generation's runs are counted, and none is kept."""

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from kptrace.experiments.cilium_attach import TcFilter
from kptrace.experiments.netns import Namespace
from kptrace.kernel.attach_datapath import update_link
from kptrace.kernel.load import ProgramType
from kptrace.kernel.objects import program_info
from kptrace.kernel.run_statistics import RunStatistics
from tests.native import traffic
from tests.native.objects_bench import closing, returning
from tests.vm.datapath_bench import PORT, DatapathBench, Lacking, alive, at_loopback, program, send, until

pytestmark = pytest.mark.promised("datapath_lookup", "fentry")


@pytest.fixture
def bench() -> Iterator[DatapathBench]:
    """The signal, with nothing to measure yet."""
    made = DatapathBench()
    yield made
    assert made.lost() == 0
    made.signal.close()


def test_fifty_replacements_under_traffic(namespace: Namespace, lacking: Lacking) -> None:
    """Datagrams while the program is replaced 50 times: each generation's runs are counted from its attachment to its end.

    What a generation ran before it was attached to is the gap, which the kernel's own run counts bound.
    """
    name = "cil_from_netdev"
    target = program(name, ProgramType.SCHED_CLS, returning(-1))
    link = at_loopback(namespace, target, lacking)
    bench = DatapathBench()
    numbers = [bench.add(target)]
    over, sent = threading.Event(), []

    def flood() -> None:
        with traffic.udp_sink(socket.AF_INET, PORT):
            while not over.is_set():
                traffic.udp_one_flow(socket.AF_INET, PORT, 10)
                sent.append(10)

    bench.look()
    with RunStatistics():
        sender = threading.Thread(target=lambda: namespace.call(flood))
        sender.start()
        ran, missed_at_least, missed_at_most, descriptors = 0, 0, 0, set[int]()
        try:
            until(lambda: bench.count() > 0)
            for _ in range(50):
                following = program(name, ProgramType.SCHED_CLS, returning(-1))
                numbers.append(bench.add(following))
                update_link(link, following)
                missed_at_least += program_info(following).run_count
                bench.look()
                missed_at_most += program_info(following).run_count
                descriptors.add(_bpf_descriptors())
                counted = bench.count()
                until(lambda known=counted: bench.count() > known + 1)  # type: ignore[misc]
                # The new one has run: no run of the old one is under way any more.
                ran += program_info(target).run_count
                os.close(target)
                target = following
        finally:
            over.set()
            sender.join()
        ran += program_info(target).run_count
    assert sum(sent) == ran
    assert ran - missed_at_most <= bench.count() <= ran - missed_at_least
    assert len(descriptors) == 1
    assert bench.values("kptrace_lookup_programs") == {("cilium", "tc_ingress", "from_netdev", "measured"): 1}
    assert bench.lost() == 0
    until(lambda: not any(alive(number) for number in numbers[:-1]))
    bench.signal.close()
    os.close(link)
    os.close(target)
    until(lambda: not alive(numbers[-1]))


def test_a_replaced_filter_of_tc_lets_its_program_go(bench: DatapathBench, namespace: Namespace) -> None:
    """Where no link tells: both programs are measured until the old one is seen to be idle; then the kernel frees it."""
    name = "cil_from_netdev"
    first = program(name, ProgramType.SCHED_CLS, returning(-1))
    number = bench.add(first)
    attached = namespace.call(lambda: TcFilter(first, name, "lo", ingress=True))
    bench.look()
    namespace.call(lambda: send(socket.AF_INET, 101))
    second = program(name, ProgramType.SCHED_CLS, returning(-1))
    with closing(second):
        bench.add(second)
        bench.look()
        namespace.call(lambda: attached.replace(second))
        os.close(first)
        namespace.call(lambda: send(socket.AF_INET, 53))
        assert bench.count(family="ipv4") == 154
        assert alive(number)

        def gone() -> bool:
            bench.look()
            return not alive(number)

        until(gone)
        namespace.call(lambda: send(socket.AF_INET, 7))
        assert bench.count(family="ipv4") == 161
        namespace.call(attached.close)


def test_programs_that_are_gone_are_let_go(bench: DatapathBench) -> None:
    """A program that nobody else holds, and that no link ever had, is freed once it does not run."""
    target = program("cil_from_netdev", ProgramType.SCHED_CLS, returning(0))
    number = bench.add(target)
    bench.look()
    following = program("cil_from_netdev", ProgramType.SCHED_CLS, returning(0))
    bench.add(following)
    os.close(target)
    with closing(following):

        def gone() -> bool:
            bench.look()
            return not alive(number)

        until(gone)


def _bpf_descriptors() -> int:
    """How many programs, maps and links this process holds; the sender's sockets come and go meanwhile."""
    count = 0
    for path in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            count += str(path.readlink()).startswith("anon_inode:bpf")
    return count
