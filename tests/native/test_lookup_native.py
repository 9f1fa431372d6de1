# SPDX-License-Identifier: Apache-2.0
"""Hook brackets on this machine's kernel: exact counts, against nft's own counters."""

import socket
from collections.abc import Callable

import pytest

from kptrace.experiments.netns import Namespace
from kptrace.model.identity import Protocol, ServiceAddress, ServicePort, Snapshot
from tests.native import traffic
from tests.native.lookup_bench import LookupBench, nft, nft_counter

PORT = 5353
Measure = Callable[..., LookupBench]
FAMILIES = {"ip": socket.AF_INET, "ip6": socket.AF_INET6}
LABEL = {"ip": "ipv4", "ip6": "ipv6"}
NAT_RULE = {"ip": "ip daddr 192.0.2.1 dnat to 192.0.2.2", "ip6": "ip6 daddr 2001:db8::1 dnat to 2001:db8::2"}


def output_chain(family: str, rule: str, *, priority: int = 0, kind: str = "filter", table: str = "t") -> str:
    """A table with one base chain at OUTPUT."""
    return (
        f"table {family} {table} {{\n chain c {{\n  type {kind} hook output priority {priority};\n  {rule}\n"
        f"  {NAT_RULE[family] if kind == 'nat' else ''}\n }}\n}}\n"
    )


@pytest.mark.parametrize("count", [23, 101, 997])
@pytest.mark.parametrize("family", ["ip", "ip6"])
def test_every_accepted_datagram_is_counted(
    measure: Measure, namespace: Namespace, family: str, count: int
) -> None:
    """A filter chain's samples are exactly the packets that nft counted in it."""
    nft(namespace, output_chain(family, f"udp dport {PORT} counter"))
    bench = measure()

    def send() -> None:
        with traffic.udp_sink(FAMILIES[family], PORT):
            traffic.udp_one_flow(FAMILIES[family], PORT, count)

    namespace.call(send)
    assert nft_counter(namespace, "c", family=family) == count
    assert bench.count(table="t", chain="c", hook="output", family=LABEL[family], verdict="accept") == count
    assert sum(bench.unpaired().values()) == 0


@pytest.mark.parametrize("verdict", ["drop", "reject"])
@pytest.mark.parametrize("family", ["ip", "ip6"])
@pytest.mark.parametrize("protocol", ["udp", "tcp"])
def test_refused_packets_are_counted_as_dropped(
    measure: Measure, namespace: Namespace, family: str, verdict: str, protocol: str
) -> None:
    """A dropped or rejected packet closes its bracket with verdict=drop, none is lost."""
    action = "reject with tcp reset" if (verdict, protocol) == ("reject", "tcp") else verdict
    nft(namespace, output_chain(family, f"{protocol} dport {PORT} counter {action}"))
    bench = measure()
    send = traffic.udp_one_flow if protocol == "udp" else traffic.tcp_refused
    namespace.call(lambda: send(FAMILIES[family], PORT, 23))
    counted = nft_counter(namespace, "c", family=family)
    assert counted == 23
    assert bench.count(table="t", verdict="drop", family=LABEL[family]) == counted


@pytest.mark.parametrize(("command", "family"), [("iptables-legacy", "ip"), ("ip6tables-legacy", "ip6")])
@pytest.mark.parametrize("target", ["ACCEPT", "DROP", "REJECT"])
def test_legacy_tables_are_counted(
    measure: Measure, namespace: Namespace, command: str, family: str, target: str
) -> None:
    """A legacy filter table is measured at its fixed priority, whatever its verdict."""
    namespace.run([command, "-A", "OUTPUT", "-p", "udp", "--dport", str(PORT), "-j", target])
    bench = measure()

    def send() -> None:
        with traffic.udp_sink(FAMILIES[family], PORT):
            traffic.udp_one_flow(FAMILIES[family], PORT, 31)

    namespace.call(send)
    listing = namespace.run([command, "-L", "OUTPUT", "-v", "-x", "-n"])
    assert (
        int(next(line for line in listing.splitlines() if target in line and "dpt" in line).split()[0]) == 31
    )
    verdict = "accept" if target == "ACCEPT" else "drop"
    assert (
        bench.count(
            dataplane="iptables-legacy", table="filter", chain="OUTPUT", family=LABEL[family], verdict=verdict
        )
        == 31
    )


@pytest.mark.parametrize("family", ["ip", "ip6"])
def test_an_unanswered_flow_walks_nat_once(measure: Measure, namespace: Namespace, family: str) -> None:
    """Of 101 datagrams of one unanswered flow one is walk=first, as nft's counter in the nat chain says."""
    nft(namespace, output_chain(family, f"udp dport {PORT} counter", kind="nat", priority=-100))
    bench = measure()

    def send() -> None:
        with traffic.udp_sink(FAMILIES[family], PORT):
            traffic.udp_one_flow(FAMILIES[family], PORT, 101)

    namespace.call(send)
    assert nft_counter(namespace, "c", family=family) == 1
    assert bench.count(table="t", walk="first", ct_state="new") == 1
    assert bench.count(table="t", walk="rest", ct_state="new") == 100


def test_every_new_connection_walks_nat(measure: Measure, namespace: Namespace) -> None:
    """First packets of TCP connections are walk=first, and nothing else is."""
    nft(namespace, output_chain("ip", f"tcp dport {PORT} counter", kind="nat", priority=-100))
    bench = measure()
    namespace.call(lambda: traffic.tcp_connects(socket.AF_INET, PORT, 101))
    assert nft_counter(namespace, "c") == 101
    assert bench.count(table="t", walk="first") == 101
    assert bench.count(table="t", walk="rest", ct_state="established") > 101


@pytest.mark.parametrize("declared", [-150, -50])
def test_nat_chains_are_measured_where_nat_runs(
    measure: Measure, namespace: Namespace, declared: int
) -> None:
    """A NAT chain's declared priority does not matter: its bracket encloses -100, and it counts first packets."""
    nft(namespace, output_chain("ip", f"udp dport {PORT} counter", kind="nat", priority=declared))
    bench = measure()

    def send() -> None:
        with traffic.udp_sink(socket.AF_INET, PORT):
            traffic.udp_flows(socket.AF_INET, PORT, 23)

    namespace.call(send)
    assert nft_counter(namespace, "c") == 23
    assert bench.count(table="t", walk="first") == 23
    priorities = sorted(b.priority for b in bench.signal.boundaries if b.hook.label == "output")
    assert priorities[0] < -100 < priorities[-1]
    assert not any(-160 <= p <= -140 or -60 <= p <= -40 for p in priorities)


def test_before_conntrack_there_is_no_state(measure: Measure, namespace: Namespace) -> None:
    """A chain before connection tracking reports ct_state none."""
    nft(
        namespace,
        output_chain("ip", f"udp dport {PORT} counter", priority=-300)
        + output_chain("ip", f"udp dport {PORT} counter", kind="nat", priority=-100, table="n"),
    )
    bench = measure()

    def send() -> None:
        with traffic.udp_sink(socket.AF_INET, PORT):
            traffic.udp_one_flow(socket.AF_INET, PORT, 23)

    namespace.call(send)
    assert nft_counter(namespace, "c") == 23
    assert bench.count(table="t", ct_state="none", walk="rest") == 23
    assert bench.count(table="n") == 23


def test_first_packets_are_counted_by_service(measure: Measure, namespace: Namespace) -> None:
    """Each known Service has as many samples as it got first packets, and unknown addresses have none."""
    nft(namespace, output_chain("ip", f"udp dport {PORT} counter", kind="nat", priority=-100))
    bench = measure()
    counts = {7: 23, 8: 31, 9: 47}
    bench.signal.set_identity(
        Snapshot(
            services={
                ServiceAddress(f"127.0.0.{host}", PORT, Protocol.UDP): ServicePort(
                    "shop", f"svc-{host}", "dns", Protocol.UDP
                )
                for host in counts
            }
        )
    )

    def send() -> None:
        for host, count in {**counts, 10: 5}.items():
            for source in range(count):
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                    sender.bind(("127.0.0.1", 20000 + source))
                    sender.sendto(b"k", (f"127.0.0.{host}", PORT))

    namespace.call(send)
    assert nft_counter(namespace, "c") == sum(counts.values()) + 5
    assert bench.count(table="t", walk="first", ct_state="new") == sum(counts.values()) + 5
    for timer in bench.timers.calls:
        timer()
    assert bench.services() == {f"svc-{host}": count for host, count in counts.items()}


def test_a_new_chain_is_planned_without_disturbing_the_others(measure: Measure, namespace: Namespace) -> None:
    """A chain that appears gets its bracket at the next tick; the counts of the others go on where they were."""
    nft(namespace, output_chain("ip", f"udp dport {PORT} counter"))
    bench = measure()

    def send() -> None:
        with traffic.udp_sink(socket.AF_INET, PORT):
            traffic.udp_one_flow(socket.AF_INET, PORT, 23)

    namespace.call(send)
    before = set(bench.signal.boundaries)
    nft(namespace, output_chain("ip", f"udp dport {PORT} counter", priority=300, table="late"))
    bench.signal.tick()
    assert before <= set(bench.signal.boundaries)
    namespace.call(send)
    assert bench.count(table="t", verdict="accept") == 46 == nft_counter(namespace, "c")
    assert bench.count(table="late") == 23 == nft_counter(namespace, "c", table="late")
    nft(namespace, "delete table ip late")
    bench.signal.tick()
    assert set(bench.signal.boundaries) == before
    assert bench.count(table="late") == 23


def test_a_second_kptrace_counts_the_same(measure: Measure, namespace: Namespace) -> None:
    """Two kptraces on one namespace both count every packet."""
    nft(namespace, output_chain("ip", f"udp dport {PORT} counter"))
    first, second = measure(), measure()

    def send() -> None:
        with traffic.udp_sink(socket.AF_INET, PORT):
            traffic.udp_one_flow(socket.AF_INET, PORT, 101)

    namespace.call(send)
    assert nft_counter(namespace, "c") == 101
    assert first.count(table="t") == second.count(table="t") == 101


def test_the_floor_is_measured(measure: Measure, namespace: Namespace) -> None:
    """An empty bracket reads more than nothing, and less than a bracket around 2,000 rules."""
    rules = "\n".join(f"  ip daddr 10.{n >> 8}.{n & 255}.1 counter" for n in range(2000))
    nft(namespace, output_chain("ip", f"udp dport {PORT} counter\n{rules}"))
    bench = measure()

    def send() -> None:
        with traffic.udp_sink(socket.AF_INET, PORT):
            traffic.udp_one_flow(socket.AF_INET, PORT, 101)

    namespace.call(send)
    floor = next(
        family.samples[0].value
        for family in bench.signal.families()
        if family.spec.name == "kptrace_lookup_floor_seconds"
    )
    mean = next(row["mean_ns"] for row in bench.samples() if row["table"] == "t")
    assert 0 < floor * 1e9 < mean / 3
