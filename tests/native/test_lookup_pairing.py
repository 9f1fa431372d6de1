# SPDX-License-Identifier: Apache-2.0
"""Pairing where packets are many, cloned, cut into pieces, or pass a bridge: every one counted, none paired wrongly."""

import socket
from collections.abc import Callable

import pytest

from kptrace.experiments.flood import flood
from kptrace.experiments.netns import Namespace
from kptrace.model.identity import Protocol, ServiceAddress
from tests.native import traffic
from tests.native.lookup_bench import LookupBench, nft, nft_counter

PORT = 5353
Measure = Callable[..., LookupBench]


def test_a_million_packets_from_two_cpus(measure: Measure, namespace: Namespace) -> None:
    """A flood of 1,000,000 datagrams from two CPUs gives 1,000,000 samples and no loss."""
    chain = (
        f"table ip t {{ chain c {{ type filter hook output priority -100; udp dport {PORT} counter; }}; }}"
    )
    nft(namespace, chain)
    bench = measure()
    with namespace.enter():
        sink = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with sink:
        sink.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        sink.bind(("127.0.0.1", PORT))
        flood(namespace, ServiceAddress("127.0.0.1", PORT, Protocol.UDP), 1_000_000, cpus=2)
    assert nft_counter(namespace, "c") == 1_000_000
    assert bench.count(table="t", verdict="accept") == 1_000_000
    assert sum(bench.unpaired().values()) == 0


def test_a_duplicated_packet_is_counted_as_nft_counts_it(measure: Measure, namespace: Namespace) -> None:
    """`dup` clones the packet inside the bracket: the original is paired, the clone enters the hook by itself."""
    namespace.ip(["addr add 127.0.0.9/8 dev lo"])
    nft(
        namespace,
        "table ip t {\n chain c {\n  type filter hook output priority -100;\n"
        f"  udp dport {PORT} counter dup to 127.0.0.9 device lo\n }}\n}}\n",
    )
    bench = measure()

    def send() -> None:
        with traffic.udp_sink(socket.AF_INET, PORT):
            traffic.udp_one_flow(socket.AF_INET, PORT, 47)

    namespace.call(send)
    assert nft_counter(namespace, "c") >= 47
    assert bench.count(table="t", verdict="accept") == nft_counter(namespace, "c")
    assert sum(bench.unpaired().values()) == 0


@pytest.mark.parametrize("size", [4000, 60000])
def test_fragments_pair_right(measure: Measure, namespace: Namespace, size: int) -> None:
    """Datagrams larger than the link's MTU are counted as often as nft counts them, before and after they are cut."""
    namespace.ip(["link set lo mtu 1500"])
    nft(
        namespace,
        "table ip t {\n chain c {\n  type filter hook output priority -100;\n  ip daddr 127.0.0.1 counter\n }\n"
        " chain p {\n  type filter hook input priority 0;\n  ip daddr 127.0.0.1 counter\n }\n}\n",
    )
    bench = measure()

    def send() -> None:
        with (
            traffic.udp_sink(socket.AF_INET, PORT),
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender,
        ):
            for _ in range(23):
                sender.sendto(bytes(size), ("127.0.0.1", PORT))

    namespace.call(send)
    assert nft_counter(namespace, "c") == 23
    assert bench.count(chain="c") == 23
    assert bench.count(chain="p") == nft_counter(namespace, "p") > 0
    assert sum(bench.unpaired().values()) == 0


def test_packets_through_a_bridge_pair_right(measure: Measure, namespace: Namespace) -> None:
    """With bridge-netfilter on, IP packets that only cross a bridge meet the hooks, and are counted there."""
    with Namespace("left") as left, Namespace("right") as right:
        for side, host in ((left, 1), (right, 2)):
            name = f"v{host}"
            namespace.ip([f"link add {name} type veth peer name eth0 netns {side.name}"])
            side.ip([f"addr add 192.0.2.{host}/24 dev eth0", "link set eth0 up"])
        namespace.ip(
            ["link add br0 type bridge", *(f"link set v{n} master br0 up" for n in (1, 2)), "link set br0 up"]
        )
        namespace.sysctl({"net.bridge.bridge-nf-call-iptables": "1"})
        nft(
            namespace,
            "table ip t {\n chain c {\n  type filter hook forward priority 0;\n"
            f"  udp dport {PORT} counter\n }}\n}}\n",
        )
        bench = measure()

        def send() -> None:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                for _ in range(101):
                    sender.sendto(b"k", ("192.0.2.2", PORT))

        def receive_and_send() -> None:
            left.call(send)

        with right.enter():
            sink = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with sink:
            sink.bind(("192.0.2.2", PORT))
            receive_and_send()
            sink.settimeout(5)
            for _ in range(101):
                assert sink.recv(16) == b"k"
        assert nft_counter(namespace, "c") == 101
        assert bench.count(table="t", hook="forward") == 101
        assert sum(bench.unpaired().values()) == 0
