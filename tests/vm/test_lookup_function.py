# SPDX-License-Identifier: Apache-2.0
"""fentry and kprobes on the functions that walk the rules: every packet, as nft and iptables count it themselves."""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count as counting
from pathlib import Path
from typing import Any, NoReturn

import pytest

from kptrace.experiments.flood import flood
from kptrace.experiments.netns import Namespace
from kptrace.model.identity import Protocol, ServiceAddress
from tests.native import traffic
from tests.native.lookup_bench import nft, nft_counter
from tests.vm.function_bench import FunctionBench, modprobe

PORT = 5353
FAMILIES = {"ip": socket.AF_INET, "ip6": socket.AF_INET6}
LABEL = {"ip": "ipv4", "ip6": "ipv6"}
LEGACY = {"ip": "iptables-legacy", "ip6": "ip6tables-legacy"}
NAT_RULE = {"ip": "ip daddr 192.0.2.1 dnat to 192.0.2.2", "ip6": "ip6 daddr 2001:db8::1 dnat to 2001:db8::2"}
MECHANISMS = [
    pytest.param(name, marks=pytest.mark.promised("lookup", name), id=name) for name in ("fentry", "kprobe")
]
_NUMBERS = counting()


@dataclass
class Watched:
    """The watched namespace, another one, and what measures both."""

    host: Namespace
    pod: Namespace
    bench: FunctionBench
    lacks: str

    def table(self) -> str:
        """A table's name that no other test has."""
        return f"t{next(_NUMBERS)}"


@pytest.fixture(scope="module", params=MECHANISMS)
def watched(request: pytest.FixtureRequest) -> Iterator[Watched]:
    """One mechanism for all tests: to attach takes seconds here."""
    loaded = modprobe("-a", "nf_tables", "ip_tables", "ip6_tables", "br_netfilter")
    assert loaded.returncode == 0, loaded.stderr
    btf = Path("/sys/kernel/btf/nf_tables")
    with Namespace("host") as host, Namespace("pod") as pod:
        bench = FunctionBench(request.param, host)
        yield Watched(host, pod, bench, "" if btf.exists() else f"{btf} is not there")
        print(bench.state(), bench.unpaired())
        bench.close()


@pytest.fixture
def walks(watched: Watched, lacking: Callable[[str], NoReturn]) -> Iterator[Watched]:
    """The same, where nft_do_chain can be measured: without its module's BTF nothing is known of its arguments."""
    if watched.lacks:
        assert watched.bench.state().reason == "no_module_btf"
        lacking(watched.lacks)
    yield watched
    for namespace in (watched.host, watched.pod):
        nft(namespace, "flush ruleset")


def chain(
    table: str,
    rule: str,
    *,
    family: str = "ip",
    hook: str = "output",
    kind: str = "filter",
    priority: int = 0,
) -> str:
    """A table with one base chain."""
    return (
        f"table {family} {table} {{\n chain c {{\n  type {kind} hook {hook} priority {priority};\n  {rule}\n"
        f"  {NAT_RULE[family] if kind == 'nat' else ''}\n }}\n}}\n"
    )


def send(namespace: Namespace, family: str, packets: int) -> None:
    """Datagrams of one flow over the loopback."""

    def run() -> None:
        with traffic.udp_sink(FAMILIES[family], PORT):
            traffic.udp_one_flow(FAMILIES[family], PORT, packets)

    namespace.call(run)


def lost(bench: FunctionBench) -> int:
    """All losses."""
    return sum(bench.unpaired().values())


@pytest.mark.parametrize("packets", [23, 997])
@pytest.mark.parametrize("family", ["ip", "ip6"])
def test_every_accepted_datagram_is_counted(walks: Watched, family: str, packets: int) -> None:
    """A chain's samples are exactly the packets that nft counted in it."""
    table, before = walks.table(), lost(walks.bench)
    nft(walks.host, chain(table, f"udp dport {PORT} counter", family=family))
    send(walks.host, family, packets)
    assert nft_counter(walks.host, "c", table, family) == packets
    counted = walks.bench.count(table=table, chain="c", hook="output", family=LABEL[family], netns="host")
    assert counted == packets
    assert walks.bench.count(table=table, verdict="accept", dataplane="nftables") == packets
    assert lost(walks.bench) == before


@pytest.mark.parametrize("family", ["ip", "ip6"])
def test_dropped_packets_have_the_verdict_drop(walks: Watched, family: str) -> None:
    """The verdict is what the function returned."""
    table = walks.table()
    nft(walks.host, chain(table, f"udp dport {PORT} counter drop", family=family))
    send(walks.host, family, 31)
    assert nft_counter(walks.host, "c", table, family) == 31
    assert walks.bench.count(table=table, verdict="drop") == 31
    assert walks.bench.count(table=table) == 31


@pytest.mark.parametrize("target", ["ACCEPT", "DROP", "REJECT"])
@pytest.mark.parametrize("family", ["ip", "ip6"])
def test_legacy_tables_are_counted(watched: Watched, family: str, target: str) -> None:
    """A legacy table's samples are what iptables counted; an ICMP error is sent from inside the walk that it is for."""
    command = LEGACY[family]
    labels = {"dataplane": "iptables-legacy", "table": "filter", "chain": "OUTPUT", "family": LABEL[family]}
    before = {verdict: watched.bench.count(**labels, verdict=verdict) for verdict in ("accept", "drop")}
    watched.host.run([command, "-A", "OUTPUT", "-p", "udp", "--dport", str(PORT), "-j", target])
    try:
        send(watched.host, family, 31)
        listing = watched.host.run([command, "-L", "OUTPUT", "-v", "-x", "-n"])
    finally:
        watched.host.run([command, "-F", "OUTPUT"])
    rule = next(line for line in listing.splitlines() if target in line and "dpt" in line)
    assert int(rule.split()[0]) == 31
    after = {verdict: watched.bench.count(**labels, verdict=verdict) for verdict in ("accept", "drop")}
    # The policy's counter in the listing's head has the errors, and what else was sent.
    accepted = int(listing.splitlines()[0].split("policy ACCEPT ")[1].split()[0])
    gained = {verdict: after[verdict] - before[verdict] for verdict in after}
    if target == "ACCEPT":
        assert gained == {"accept": 31, "drop": 0}
    else:
        assert gained["drop"] == 31
        assert gained["accept"] == (31 if target == "REJECT" else 0) <= accepted
    assert lost(watched.bench) == 0


def test_network_namespaces_are_told_apart(walks: Watched) -> None:
    """Chains of the same name in two namespaces are host's and pod's, each with its own packets."""
    table = walks.table()
    for namespace in (walks.host, walks.pod):
        nft(namespace, chain(table, f"udp dport {PORT} counter"))
    send(walks.host, "ip", 41)
    send(walks.pod, "ip", 17)
    for namespace, label, packets in ((walks.host, "host", 41), (walks.pod, "pod", 17)):
        assert nft_counter(namespace, "c", table) == packets
        assert walks.bench.count(table=table, netns=label) == packets


def test_an_unanswered_flow_walks_nat_once(walks: Watched) -> None:
    """The NAT chain is called for one of 101 datagrams; a chain before it sees one first packet, one after it none."""
    nat, early, late = walks.table(), walks.table(), walks.table()
    nft(
        walks.host,
        chain(nat, f"udp dport {PORT} counter", kind="nat", priority=-100)
        + chain(early, f"udp dport {PORT} counter", priority=-150)
        + chain(late, f"udp dport {PORT} counter"),
    )
    send(walks.host, "ip", 101)
    assert nft_counter(walks.host, "c", nat) == 1
    bench = walks.bench
    assert bench.count(table=nat) == bench.count(table=nat, walk="first", ct_state="new") == 1
    # A chain before NAT does not know of NAT before a packet walked it.
    assert (
        bench.count(table=early, walk="rest") == bench.count(table=late, walk="rest", ct_state="new") == 101
    )
    # ... then of each flow's packets it is the first one.
    nft(walks.host, f"flush table ip {early}\nadd rule ip {early} c udp sport 23456 counter")
    before = bench.count(table=early, walk="first")

    def again() -> None:
        with (
            traffic.udp_sink(socket.AF_INET, PORT),
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender,
        ):
            sender.bind(("127.0.0.1", 23456))
            for _ in range(7):
                sender.sendto(b"k", ("127.0.0.1", PORT))

    walks.host.call(again)
    assert nft_counter(walks.host, "c", early) == 7
    assert bench.count(table=early, walk="first") - before == 1


def test_established_connections_have_their_state(walks: Watched) -> None:
    """First packets of TCP connections walk NAT, the others are established and do not."""
    nat, late = walks.table(), walks.table()
    nft(
        walks.host,
        chain(nat, f"tcp dport {PORT} counter", kind="nat", priority=-100)
        + chain(late, f"tcp dport {PORT} counter", hook="input"),
    )
    walks.host.call(lambda: traffic.tcp_connects(socket.AF_INET, PORT, 23))
    assert nft_counter(walks.host, "c", nat) == 23
    assert walks.bench.count(table=nat, walk="first", ct_state="new") == walks.bench.count(table=nat) == 23
    assert walks.bench.count(table=late, ct_state="new") == 23
    assert walks.bench.count(table=late, ct_state="established") > 23


def test_iptables_nft_is_told_from_nft(walks: Watched) -> None:
    """A table that iptables-nft made is called so, in the family ip; one of inet is nftables' whatever its name."""
    walks.host.run(["iptables-nft", "-A", "OUTPUT", "-p", "udp", "--dport", str(PORT), "-j", "ACCEPT"])
    nft(
        walks.host,
        f"table inet filter {{ chain OUTPUT {{ type filter hook output priority 5; udp dport {PORT} counter; }}; }}",
    )
    send(walks.host, "ip", 19)
    assert nft_counter(walks.host, "OUTPUT", "filter", "inet") == 19
    for dataplane in ("iptables-nft", "nftables"):
        assert walks.bench.count(table="filter", chain="OUTPUT", dataplane=dataplane) == 19


def test_a_chain_made_anew_goes_on_where_it_was(walks: Watched) -> None:
    """Handles and addresses change, the name does not: one series."""
    table = walks.table()
    for _ in range(3):
        nft(walks.host, chain(table, f"udp dport {PORT} counter"))
        send(walks.host, "ip", 13)
        nft(walks.host, f"delete table ip {table}")
    assert [row["count"] for row in walks.bench.rows() if row["table"] == table] == [39]


def test_a_duplicated_packet_is_nested(walks: Watched) -> None:
    """`dup` sends a clone from inside the walk, which enters the hook by itself; both are counted, none is lost."""
    table = walks.table()
    walks.host.ip(["addr replace 127.0.0.9/8 dev lo"])
    nft(walks.host, chain(table, f"udp dport {PORT} counter dup to 127.0.0.9 device lo"))
    send(walks.host, "ip", 47)
    counted = nft_counter(walks.host, "c", table)
    assert counted > 47
    assert walks.bench.count(table=table) == counted
    assert lost(walks.bench) == 0


def test_a_rejected_packets_error_is_nested(walks: Watched) -> None:
    """`reject` sends an ICMP error through OUTPUT from inside the walk; inner walks are not longer than outer ones."""
    table = walks.table()
    nft(
        walks.host,
        chain(table, f"udp dport {PORT} counter reject\n  icmp type destination-unreachable counter"),
    )
    send(walks.host, "ip", 43)
    rows: dict[str, Any] = {row["verdict"]: row for row in walks.bench.rows() if row["table"] == table}
    assert rows["drop"]["count"] == rows["accept"]["count"] == nft_counter(walks.host, "c", table) == 43
    assert 0 < rows["accept"]["sum"] <= rows["drop"]["sum"]
    assert lost(walks.bench) == 0


def test_bridged_packets_are_counted(walks: Watched) -> None:
    """br_netfilter calls the IP chains from the bridge's hooks, with the same skb more than once."""
    table = walks.table()
    with Namespace("left") as left, Namespace("right") as right:
        walks.host.ip(["link add br0 type bridge", "link set br0 up"])
        try:
            for number, end in enumerate((left, right), 1):
                walks.host.ip([f"link add p{number} type veth peer name e0 netns {end.name}"])
                walks.host.ip([f"link set p{number} master br0 up"])
                end.ip([f"addr add 10.9.0.{number}/24 dev e0", "link set e0 up"])
            walks.host.sysctl({"net.bridge.bridge-nf-call-iptables": "1"})
            hooks = ("prerouting", "forward", "postrouting")
            nft(
                walks.host,
                "".join(chain(f"{table}{hook}", f"udp dport {PORT} counter", hook=hook) for hook in hooks),
            )

            def run() -> None:
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                    for _ in range(29):
                        sender.sendto(b"k", ("10.9.0.2", PORT))

            left.call(run)
            # The other end answers with errors, which have another protocol.
            for hook in hooks:
                assert nft_counter(walks.host, "c", f"{table}{hook}") == 29
                assert walks.bench.count(table=f"{table}{hook}", hook=hook) >= 29
            assert lost(walks.bench) == 0
        finally:
            walks.host.ip(["link del br0"])


def interrupt(namespace: Namespace, packets: int) -> None:
    """Send from a real-time thread that wakes up again and again: it preempts who floods, inside of a walk too."""

    def run() -> None:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(10))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            for _ in range(packets):
                sender.sendto(b"k", ("127.0.0.1", PORT))
                time.sleep(0.002)

    namespace.call(run)


def test_a_flood_that_is_preempted_is_accounted_for(walks: Watched) -> None:
    """Samples and what the kernel says it missed are the calls: a miss of both ends of one call counts twice."""
    table, before, packets, urgent = walks.table(), walks.bench.unpaired(), 20_000, 499
    nft(walks.host, chain(table, f"udp dport {PORT} counter"))
    with walks.host.enter():
        sink = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with sink:
        sink.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        sink.bind(("127.0.0.1", PORT))
        threads = [threading.Thread(target=interrupt, args=(walks.host, urgent)) for _ in range(2)]
        for thread in threads:
            thread.start()
        flood(walks.host, ServiceAddress("127.0.0.1", PORT, Protocol.UDP), packets, cpus=2)
        for thread in threads:
            thread.join()
    calls = packets + 2 * urgent
    assert nft_counter(walks.host, "c", table) == calls
    after = walks.bench.unpaired()
    missed = {reason: after[reason] - before[reason] for reason in after}
    rows = [row for row in walks.bench.rows() if row["table"] == table]
    samples, losses = sum(row["count"] for row in rows), sum(missed.values())
    print(f"{samples} samples of {calls} calls, {missed}")
    assert samples <= calls <= samples + losses
    assert samples + losses <= calls + losses // 2
