# SPDX-License-Identifier: Apache-2.0
"""Packets in tunnels walk the rules as what is inside and as what is outside: both are counted, by every mechanism."""

import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from kptrace.experiments.netns import Namespace
from kptrace.kernel.compile import Compiler
from kptrace.signals.lookup_kernel import REQUEST
from tests.native.lookup_bench import LookupBench, nft
from tests.vm.function_bench import FunctionBench, modprobe

PORT = 5353
PACKETS = 47
MECHANISMS = [
    pytest.param(name, marks=pytest.mark.promised("lookup", name), id=name)
    for name in ("bracket", "fentry", "kprobe")
]
#: The IP protocol's number of each kind of tunnel.
TUNNELS = {"ipip": 4, "gre": 47}
Bench = LookupBench | FunctionBench


@pytest.fixture(params=TUNNELS)
def tunnel(request: pytest.FixtureRequest, lacking: Callable[[str], NoReturn]) -> str:
    """A kind of tunnel that this kernel has."""
    loaded = modprobe({"ipip": "ipip", "gre": "ip_gre"}[request.param])
    if loaded.returncode != 0:
        lacking(loaded.stderr.strip())
    return str(request.param)


@pytest.fixture
def ends(tunnel: str) -> Iterator[tuple[Namespace, Namespace]]:
    """Two namespaces, 10.9.0.1 and 10.9.0.2 on a veth pair, 10.8.0.1 and 10.8.0.2 in the tunnel through it."""
    assert modprobe("nf_tables").returncode == 0
    with Namespace("host") as host, Namespace("pod") as pod:
        host.ip([f"link add v0 type veth peer name v0 netns {pod.name}"])
        for end, own, other in ((host, 1, 2), (pod, 2, 1)):
            # What comes through the tunnel may be from an address that is not behind it.
            end.sysctl({f"net.ipv4.conf.{name}.rp_filter": "0" for name in ("all", "default", "v0")})
            end.ip(
                [
                    f"addr add 10.9.0.{own}/24 dev v0",
                    "link set v0 up",
                    f"link add tun9 type {tunnel} local 10.9.0.{own} remote 10.9.0.{other}",
                    f"addr add 10.8.0.{own}/24 dev tun9",
                    "link set tun9 up",
                ]
            )
        yield host, pod


@pytest.fixture(params=MECHANISMS)
def start(
    request: pytest.FixtureRequest,
    ends: tuple[Namespace, Namespace],
    lacking: Callable[[str], NoReturn],
) -> Iterator[Callable[[], Bench]]:
    """Begin to measure the first of the two."""
    btf = Path("/sys/kernel/btf/nf_tables")
    if request.param != "bracket" and not btf.exists():
        lacking(f"{btf} is not there")
    started: list[Bench] = []

    def begin() -> Bench:
        if request.param == "bracket":
            code = Compiler(Path("/sys/kernel/btf/vmlinux"), Path("/var/cache/kptrace")).build(REQUEST)
            started.append(LookupBench(code, ends[0]))
        else:
            started.append(FunctionBench(request.param, ends[0]))
        return started[-1]

    yield begin
    for each in started:
        each.close()


def rules(namespace: Namespace, hook: str, protocol: int, extra: str = "") -> None:
    """A chain that counts what is inside and what is outside; to ask for a state is what has connections tracked."""
    nft(
        namespace,
        f"table ip t {{\n chain {hook} {{\n  type filter hook {hook} priority 0;\n  ct state invalid drop\n"
        f"  ip protocol {protocol} counter\n  udp dport {PORT} counter {extra}\n }}\n}}\n",
    )


def counters(namespace: Namespace, hook: str) -> list[int]:
    """Packets outside and inside, as nft counted them."""
    listing = json.loads(namespace.run(["nft", "-j", "list", "chain", "ip", "t", hook]))
    expressions = [each for item in listing["nftables"] for each in item.get("rule", {}).get("expr", [])]
    return [int(each["counter"]["packets"]) for each in expressions if "counter" in each]


def send(ends: tuple[Namespace, Namespace], address: str, arrive: int) -> None:
    """Send the datagrams to the second namespace, and wait until so many arrived there."""
    host, pod = ends
    with pod.enter():
        sink = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with sink:
        sink.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        sink.bind(("0.0.0.0", PORT))
        sink.settimeout(30)

        def run() -> None:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                for _ in range(PACKETS):
                    sender.sendto(b"k", (address, PORT))

        host.call(run)
        for _ in range(arrive):
            assert sink.recv(16) == b"k"


def test_both_walks_of_a_tunnels_packets_are_counted(
    tunnel: str, ends: tuple[Namespace, Namespace], start: Callable[[], Bench]
) -> None:
    """A datagram walks OUTPUT by itself and again inside the tunnel's packet: two samples each, none lost."""
    host, pod = ends
    rules(host, "output", TUNNELS[tunnel])
    rules(pod, "input", TUNNELS[tunnel])
    bench = start()
    send(ends, "10.8.0.2", PACKETS)
    assert counters(host, "output") == counters(pod, "input") == [PACKETS, PACKETS]
    assert bench.count(table="t", hook="output", netns="host", verdict="accept") == 2 * PACKETS
    if isinstance(bench, FunctionBench):
        assert bench.count(table="t", hook="input", netns="pod", verdict="accept") == 2 * PACKETS
    assert sum(bench.unpaired().values()) == 0


def test_walks_inside_of_a_walk_through_a_tunnel_are_counted(
    tunnel: str, ends: tuple[Namespace, Namespace], start: Callable[[], Bench]
) -> None:
    """A clone that `dup` sends through the tunnel walks twice within its original's walk: three samples, none lost."""
    host, pod = ends
    rules(host, "output", TUNNELS[tunnel], "dup to 10.8.0.2 device tun9")
    rules(pod, "input", TUNNELS[tunnel])
    bench = start()
    send(ends, "10.9.0.2", 2 * PACKETS)
    assert counters(host, "output") == counters(pod, "input") == [PACKETS, 2 * PACKETS]
    where = {"table": "t", "hook": "output", "netns": "host"}
    assert bench.count(**where) == bench.count(**where, verdict="accept") == 3 * PACKETS
    # A clone is not tracked; what carries it is.
    assert bench.count(**where, ct_state="untracked") == PACKETS
    assert sum(bench.unpaired().values()) == 0
    if isinstance(bench, FunctionBench):
        assert bench.count(table="t", hook="input", netns="pod") == 3 * PACKETS
        rows = [row for row in bench.rows() if row["table"] == "t" and row["hook"] == "output"]
        inner = sum(row["sum"] for row in rows if row["ct_state"] == "untracked")
        # Each clone's walk is a part of its original's.
        assert 0 < inner < sum(row["sum"] for row in rows) - inner
