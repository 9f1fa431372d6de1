# SPDX-License-Identifier: Apache-2.0
"""Brackets on other kernels: alone, where real-time senders preempt those that flood, and beside the functions."""

import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NoReturn, cast

import pytest

from kptrace.experiments import command
from kptrace.experiments.netns import Namespace
from kptrace.kernel.bytecode import Bytecode
from kptrace.kernel.compile import Compiler
from kptrace.signals.lookup_function_kernel import Mechanism
from kptrace.signals.lookup_kernel import REQUEST
from tests.native import traffic
from tests.native.lookup_bench import LookupBench, nft, nft_counter
from tests.vm.function_bench import FunctionBench, modprobe
from tests.vm.test_lookup_function import FAMILIES, LABEL, LEGACY

pytestmark = pytest.mark.promised("lookup", "bracket")

PACKETS = 997
PORT, URGENT_PORT = 5353, 5354
FAMILY = pytest.mark.parametrize("family", ["ip", "ip6"])
PLANE = pytest.mark.parametrize("plane", ["nftables", "iptables-legacy"])
Count = Callable[[], int]


@pytest.fixture(scope="module")
def bytecode() -> Bytecode:
    """The programs, compiled once."""
    return Compiler(Path("/sys/kernel/btf/vmlinux"), Path("/var/cache/kptrace")).build(REQUEST)


@pytest.fixture
def brackets(bytecode: Bytecode, namespace: Namespace) -> Iterator[Callable[[], LookupBench]]:
    """Put brackets around what the test's namespace has; every packet is sampled."""
    started: list[LookupBench] = []

    def start() -> LookupBench:
        started.append(LookupBench(bytecode, namespace))
        return started[-1]

    yield start
    for each in started:
        each.close()


@pytest.fixture
def rules(namespace: Namespace, lacking: Callable[[str], NoReturn]) -> Callable[[str, str], Count]:
    """Make a filter chain at OUTPUT, and return how to read what it counted of the test's packets."""

    def on_nft(family: str) -> Count:
        nft(
            namespace,
            f"table {family} t {{ chain c {{ type filter hook output priority 0; udp dport {PORT} counter; }}; }}",
        )
        return lambda: nft_counter(namespace, "c", "t", family)

    def on_legacy(family: str) -> Count:
        loaded = modprobe({"ip": "iptable_filter", "ip6": "ip6table_filter"}[family])
        if loaded.returncode != 0:
            lacking(loaded.stderr.strip())
        namespace.run([LEGACY[family], "-A", "OUTPUT", "-p", "udp", "--dport", str(PORT), "-j", "ACCEPT"])

        def read() -> int:
            listing = namespace.run([LEGACY[family], "-L", "OUTPUT", "-v", "-x", "-n"])
            return int(next(line for line in listing.splitlines() if "dpt:" in line).split()[0])

        return read

    return lambda plane, family: (on_nft if plane == "nftables" else on_legacy)(family)


def send(namespace: Namespace, family: str) -> None:
    """The datagrams, of one flow over the loopback."""

    def run() -> None:
        with traffic.udp_sink(FAMILIES[family], PORT):
            traffic.udp_one_flow(FAMILIES[family], PORT, PACKETS)

    namespace.call(run)


def labels(plane: str, family: str) -> dict[str, str]:
    """What every mechanism calls the chain of `rules`."""
    table, chain = ("t", "c") if plane == "nftables" else ("filter", "OUTPUT")
    where = {"family": LABEL[family], "hook": "output", "table": table, "chain": chain, "netns": "host"}
    return {"dataplane": plane, "verdict": "accept", **where}


@PLANE
@FAMILY
def test_every_packet_is_counted(
    brackets: Callable[[], LookupBench],
    rules: Callable[[str, str], Count],
    namespace: Namespace,
    plane: str,
    family: str,
) -> None:
    """A chain's samples are the packets that the data plane counted in it, and nothing is unpaired."""
    counted = rules(plane, family)
    bench = brackets()
    send(namespace, family)
    assert counted() == PACKETS
    assert bench.count(**labels(plane, family)) == PACKETS
    assert sum(row["count"] for row in bench.samples() if row["hook"] == "output") == PACKETS
    assert sum(bench.unpaired().values()) == 0


@PLANE
@FAMILY
def test_brackets_and_functions_count_the_same(
    brackets: Callable[[], LookupBench],
    rules: Callable[[str, str], Count],
    namespace: Namespace,
    mechanisms: list[tuple[str, str]],
    plane: str,
    family: str,
) -> None:
    """Side by side on the same packets, both have them all under the same labels."""
    ways = [name for signal, name in mechanisms if signal == "lookup" and name != "bracket"]
    assert ways, "a kernel that has brackets has fentry too"
    counted = rules(plane, family)
    functions = FunctionBench(cast(Mechanism, ways[0]), namespace)
    try:
        bench = brackets()
        send(namespace, family)
        assert counted() == PACKETS
        assert bench.count(**labels(plane, family)) == PACKETS
        assert functions.count(**labels(plane, family)) == PACKETS
        assert sum(bench.unpaired().values()) == sum(functions.unpaired().values()) == 0
    finally:
        functions.close()


@contextmanager
def interruptions(namespace: Namespace, threads: int) -> Iterator[list[int]]:
    """Send to where it is dropped from real-time threads: their waking preempts who floods, inside of a walk too.

    Yields how many each of them sent; they are there when the body is over.
    """
    over, sent = threading.Event(), [0] * threads

    def run(number: int) -> None:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(10))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            while not over.wait(0.002):
                with pytest.raises(PermissionError):
                    sender.sendto(b"k", ("127.0.0.1", URGENT_PORT))
                sent[number] += 1

    with ThreadPoolExecutor(threads) as pool:
        running = [pool.submit(namespace.call, partial(run, number)) for number in range(threads)]
        try:
            yield sent
        finally:
            over.set()
        for each in running:
            each.result()


def flood(namespace: Namespace, packets: int, processes: int) -> None:
    """Send so many datagrams from each process; none is tied to a CPU: preempted in a walk it may end it on another."""
    code = f"from kptrace.experiments.flood import send; send('127.0.0.1', {PORT}, {packets})"
    running = [namespace.popen([sys.executable, "-c", code]) for _ in range(processes)]
    for each in running:
        command.finish(each)


def test_a_flood_that_is_preempted_pairs_right(
    brackets: Callable[[], LookupBench], namespace: Namespace
) -> None:
    """Every packet is a sample or unpaired, and no sample has one packet's opening and another one's end.

    The opening says whether a packet is tracked, the end whether it was dropped: of the flood's packets all are tracked
    and accepted, of the urgent ones none.
    """
    packets, processes = 14_000, 3
    nft(
        namespace,
        "table ip t {\n chain r {\n  type filter hook output priority -300;\n  counter\n"
        f"  udp dport {URGENT_PORT} notrack\n }}\n"
        " chain c {\n  type filter hook output priority 0;\n  counter\n"
        f"  udp dport {URGENT_PORT} ct state untracked drop\n }}\n"
        " chain i {\n  type filter hook input priority 0;\n  counter\n }\n}\n",
    )
    bench = brackets()
    with namespace.enter():
        sink = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with sink:
        sink.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        sink.bind(("127.0.0.1", PORT))
        with interruptions(namespace, 2) as sent:
            flood(namespace, packets, processes)
    flooded, urgent = packets * processes, sum(sent)
    walked = {name: nft_counter(namespace, name) for name in ("r", "c", "i")}
    assert walked["r"] == walked["c"] == flooded + urgent
    sampled = {name: bench.count(table="t", chain=name) for name in walked}
    unpaired = bench.unpaired()
    print(f"{sampled} samples of {walked} calls, {sent} urgent ones, {unpaired}")
    assert sum(sampled.values()) + sum(unpaired.values()) == sum(walked.values())
    assert all(sampled[name] <= walked[name] for name in walked)
    assert unpaired["opened_elsewhere"] == unpaired["queued"] == 0
    kept, dropped = (
        bench.count(chain="c", ct_state=state, verdict=verdict)
        for state, verdict in (("new", "accept"), ("untracked", "drop"))
    )
    assert kept + dropped == sampled["c"], [row for row in bench.samples() if row["chain"] == "c"]
    assert kept <= flooded
    assert dropped <= urgent
    assert min(sent) > 0
