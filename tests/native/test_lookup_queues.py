# SPDX-License-Identifier: Apache-2.0
"""Packets that wait in an NFQUEUE: never lost by a re-plan, never counted as a look-up time."""

import socket
from collections.abc import Callable

from kptrace.experiments.netns import Namespace
from kptrace.model.signal import State
from tests.native import traffic
from tests.native.lookup_bench import LookupBench, nft
from tests.native.nfqueue import HeldQueue

PORT = 5353


def queue_rule(namespace: Namespace) -> None:
    """Send the test's packets to queue 7, from the legacy mangle table: not every kernel has nft's queue expression."""
    rule = ["-A", "OUTPUT", "-p", "udp", "--dport", str(PORT), "-j", "NFQUEUE", "--queue-num", "7"]
    namespace.run(["iptables-legacy", "-t", "mangle", *rule])


def receive(sink: socket.socket) -> int:
    """How many datagrams wait in a socket."""
    sink.setblocking(False)
    count = 0
    try:
        while sink.recv(64):
            count += 1
    except BlockingIOError:
        return count
    return count


def test_queued_packets_are_no_samples(measure: Callable[..., LookupBench], namespace: Namespace) -> None:
    """17 packets held in an NFQUEUE give 17 `queued` and no sample, and all of them arrive."""
    queue_rule(namespace)
    bench = measure(with_nfqueue=True)

    def hold() -> int:
        with HeldQueue(7) as queue, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sink:
            sink.bind(("127.0.0.1", PORT))
            traffic.udp_one_flow(socket.AF_INET, PORT, 17)
            ids = queue.take(17)
            queue.accept(ids)
            assert len(ids) == 17
            return receive(sink)

    assert namespace.call(hold) == 17
    assert bench.unpaired()["queued"] == 17
    assert bench.count(table="mangle", chain="OUTPUT") == 0


def test_a_replan_waits_for_queued_packets(measure: Callable[..., LookupBench], namespace: Namespace) -> None:
    """100 packets held in an NFQUEUE survive the coming and going of chains; the re-plan follows when they are gone."""
    queue_rule(namespace)
    bench = measure(with_nfqueue=True)

    def hold() -> int:
        with HeldQueue(7) as queue, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sink:
            sink.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
            sink.bind(("127.0.0.1", PORT))
            traffic.udp_one_flow(socket.AF_INET, PORT, 100)
            ids = queue.take(100)
            nft(namespace, "table ip late { chain c { type filter hook output priority 300; }; }")
            bench.signal.tick()
            assert bench.signal.states()[0].reason == "nfqueue_waiting"
            queue.accept(ids)
            arrived = receive(sink)
        bench.signal.tick()
        return arrived

    assert namespace.call(hold) == 100
    assert bench.signal.states()[0].reason == "ok"
    assert any(b.priority > 200 for b in bench.signal.boundaries)


def test_a_namespace_with_a_queue_is_left_alone(
    measure: Callable[..., LookupBench], namespace: Namespace
) -> None:
    """Without the override nothing is linked where an NFQUEUE is, and the state says why."""
    queue_rule(namespace)

    def look() -> tuple[State, str, int]:
        with HeldQueue(7):
            bench = measure()
            state = bench.signal.states()[0]
            return state.state, state.reason, len(bench.signal.boundaries)

    assert namespace.call(look) == (State.UNAVAILABLE, "nfqueue_present", 0)
