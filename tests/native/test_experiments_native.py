# SPDX-License-Identifier: Apache-2.0
"""The embedded node on the machine's own kernel: what it sends is what nft, iptables and conntrack count."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from kptrace.experiments import traffic
from kptrace.experiments.daemon_process import DaemonRequest
from kptrace.experiments.demo import DemoOptions, Kept, run_demo
from kptrace.experiments.flood import flood
from kptrace.experiments.netns import RUN_NETNS, Namespace, sweep
from kptrace.experiments.node import EmbeddedNode
from kptrace.experiments.rulesets import DATA_PLANES
from kptrace.experiments.services import PLANS, SINK_PORT, change_endpoint, make_services
from kptrace.experiments.writer import RuleWriter
from kptrace.model.errors import KptraceError
from kptrace.model.identity import Protocol
from kptrace.model.netfilter import DataPlane, Hook, IpFamily


def own_namespaces(pid: int | None = None) -> list[str]:
    """Named namespaces of a process, by default of this one."""
    names = [path.name for path in RUN_NETNS.iterdir()] if RUN_NETNS.is_dir() else []
    return [name for name in names if name.startswith("kpt-") and f"-{pid or os.getpid()}-" in name]


@pytest.fixture
def node() -> Iterator[EmbeddedNode]:
    """A fresh embedded node; nothing of it is left afterwards."""
    with EmbeddedNode() as made:
        yield made
    assert own_namespaces() == []


@pytest.mark.parametrize("family", IpFamily)
@pytest.mark.parametrize("dataplane", DATA_PLANES)
def test_every_connection_is_one_first_packet(
    node: EmbeddedNode, dataplane: DataPlane, family: IpFamily
) -> None:
    """N connections and flows, forwarded or the node's own, are N by the NAT chain's counter and N in conntrack."""
    services = [
        *make_services(100, family=family),
        *make_services(20, family=family, protocol=Protocol.UDP, first=200),
    ]
    writer = RuleWriter(node.node, dataplane, family)
    writer.install(services)
    addresses = [service.address for service in services]
    sources = traffic.client_sources(family)

    forwarded = traffic.connections(node.client, traffic.targets(addresses, 499), sources)
    assert forwarded.total == 499
    assert writer.first_packets(Hook.PREROUTING) == 499
    listed = node.node.run(["conntrack", "-L", "-f", "ipv4" if family is IpFamily.IPV4 else "ipv6"])
    assert sum("sport=" in line for line in listed.splitlines()) == 499

    own = traffic.connections(node.node, traffic.targets(addresses, 101), traffic.node_sources(family))
    assert (own.total, writer.first_packets(Hook.OUTPUT)) == (101, 101)
    assert writer.first_packets(Hook.PREROUTING) == 499


@pytest.mark.parametrize("dataplane", DATA_PLANES)
def test_churn_leads_traffic_to_the_new_endpoints(node: EmbeddedNode, dataplane: DataPlane) -> None:
    """After a one-endpoint change only present endpoints answer, and partial syncs never reset the jump's counter."""
    services = make_services(7)
    writer = RuleWriter(node.node, dataplane)
    writer.install(services)
    written = writer.churn(23)
    assert (written.syncs, written.nat_commits) == (23, 23)
    assert written.commits == (23 if dataplane is DataPlane.NFTABLES else 46)
    chosen = traffic.targets([service.address for service in services], 101)
    sent = traffic.tcp_connections(node.client, chosen, traffic.client_sources(IpFamily.IPV4))
    present = {
        f"{endpoint.ip} {endpoint.port}" for service in writer.services for endpoint in service.endpoints
    }
    assert set(sent.endpoints) <= present
    assert any(
        name not in {f"{e.ip} {e.port}" for s in services for e in s.endpoints} for name in sent.endpoints
    )
    assert writer.first_packets(Hook.PREROUTING) == 101


@pytest.mark.parametrize("dataplane", DATA_PLANES)
def test_a_service_without_endpoints_is_rejected_until_it_has_one(
    node: EmbeddedNode, dataplane: DataPlane
) -> None:
    """The change from no endpoint to one, and back, is what connections meet."""
    (empty,) = make_services(1, 0)
    writer = RuleWriter(node.node, dataplane)
    writer.install([empty])
    sources = traffic.client_sources(IpFamily.IPV4)
    with pytest.raises(KptraceError, match="answered"):
        traffic.tcp_connections(node.client, [empty.address], sources)
    writer.replace(0, change_endpoint(empty, 0))
    assert traffic.tcp_connections(node.client, [empty.address], sources).total == 1
    writer.replace(0, empty)
    with pytest.raises(KptraceError, match="answered"):
        traffic.tcp_connections(node.client, [empty.address], sources)


@pytest.mark.parametrize("family", IpFamily)
@pytest.mark.parametrize("dataplane", DATA_PLANES)
def test_an_external_address_leads_to_its_service(
    node: EmbeddedNode, dataplane: DataPlane, family: IpFamily
) -> None:
    """Connections to external addresses are answered by their Service's own back ends, which see the node as client."""
    services = make_services(7, family=family, external_every=3)
    writer = RuleWriter(node.node, dataplane, family)
    writer.install(services)
    sources = traffic.client_sources(family)
    reached = [service for service in services if service.external is not None]
    assert len(reached) == 3
    for service in reached:
        assert service.external is not None
        sent = traffic.tcp_connections(node.client, [service.external] * 23, sources)
        assert set(sent.endpoints) <= {f"{end.ip} {end.port}" for end in service.endpoints}
    assert writer.first_packets(Hook.PREROUTING) == 23 * len(reached)
    listed = node.node.run(["conntrack", "-L", "-f", "ipv4" if family is IpFamily.IPV4 else "ipv6"])
    answered_to = f" dst={PLANS[family].backend_link[1]} "
    assert sum(answered_to in line for line in listed.splitlines()) == 23 * len(reached)


@pytest.mark.parametrize("dataplane", DATA_PLANES)
def test_an_external_address_is_rejected_while_there_are_no_endpoints(
    node: EmbeddedNode, dataplane: DataPlane
) -> None:
    """Both addresses follow the Service from endpoints to none and back, and other changes of endpoints."""
    services = make_services(4, external_every=3)
    writer = RuleWriter(node.node, dataplane)
    writer.install(services)
    sources = traffic.client_sources(IpFamily.IPV4)
    writer.replace(3, replace(services[3], endpoints=()))
    for address in services[3].addresses:
        with pytest.raises(KptraceError, match="refused"):
            traffic.tcp_connections(node.client, [address], sources)
    assert traffic.tcp_connections(node.client, services[0].addresses, sources).total == 2
    writer.replace(3, services[3])
    writer.replace(3, changed := change_endpoint(services[3], 5))
    sent = traffic.tcp_connections(node.client, services[3].addresses * 11, sources)
    assert set(sent.endpoints) == {f"{end.ip} {end.port}" for end in changed.endpoints}


@pytest.mark.parametrize("dataplane", DATA_PLANES)
def test_removed_rules_are_gone(node: EmbeddedNode, dataplane: DataPlane) -> None:
    """After `remove` neither nft nor iptables shows a chain of kube-proxy's, and a second installation works."""
    writer = RuleWriter(node.node, dataplane)
    for _ in range(2):
        writer.install(make_services(3))
        writer.remove()
        shown = node.node.run(["nft", "list", "ruleset"]) + node.node.run(["iptables-legacy-save"])
        assert "KUBE" not in shown
        assert "kube-proxy" not in shown


def test_an_unanswered_flow_is_one_first_packet(node: EmbeddedNode) -> None:
    """101 datagrams of one flow that nobody answers walk the NAT chain once."""
    (sink,) = make_services(1, protocol=Protocol.UDP, target_port=SINK_PORT)
    writer = RuleWriter(node.node, DataPlane.NFTABLES)
    writer.install([sink])
    sources = traffic.client_sources(IpFamily.IPV4)
    sent = traffic.udp_flows(node.client, [sink.address], sources, datagrams=101, answered=False)
    assert (sent.packets, sent.total) == (101, 1)
    assert writer.first_packets(Hook.PREROUTING) == 1


def test_a_flood_sends_exactly_what_was_asked_for(node: EmbeddedNode) -> None:
    """A million datagrams of the node's own from every CPU are a million by a counter at OUTPUT."""
    (sink,) = make_services(1, protocol=Protocol.UDP, target_port=SINK_PORT)
    RuleWriter(node.node, DataPlane.NFTABLES).install([sink])
    node.node.run(
        ["nft", "-f", "-"],
        stdin="table ip oracle { chain output { type filter hook output priority 50 ; udp dport 9999 counter\n}\n}\n",
    )
    sent = flood(node.node, sink.address, 1_000_000)
    words = node.node.run(["nft", "list", "chain", "ip", "oracle", "output"]).split()
    assert int(words[words.index("packets") + 1]) == sent.datagrams == 1_000_000


def test_an_exception_leaves_no_namespace_behind() -> None:
    """Whatever happens inside, the namespaces and the back ends are gone afterwards."""
    with pytest.raises(RuntimeError, match="inside"), EmbeddedNode() as node:
        assert len(own_namespaces()) == 3
        raise RuntimeError("inside " + node.node.name)
    assert own_namespaces() == []


def test_what_a_killed_process_left_is_swept() -> None:
    """After SIGKILL the namespaces stay until the next `sweep`; those of living processes are never touched."""
    code = (
        "import sys\nfrom kptrace.experiments.node import EmbeddedNode\n"
        "with EmbeddedNode():\n    print('up', flush=True)\n    sys.stdin.read()\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with child, Namespace("bystander") as bystander:
        assert child.stdout is not None
        assert child.stdout.readline() == "up\n"
        left = own_namespaces(child.pid)
        assert len(left) == 3
        assert not set(sweep()) & set(left)
        child.kill()
        child.wait()
        assert set(sweep()) >= set(left)
        assert own_namespaces(child.pid) == []
        assert bystander.path.exists()


# Answers as the daemon would, with the figures of the rules' own counters: what the demo makes of them is known.
FAKE_DAEMON = """
import subprocess, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
netns, ready = sys.argv[1:]
LABELS = 'dataplane="nftables",family="ipv4",hook="prerouting",table="kube-proxy",chain="nat-prerouting",walk="first"'
def counted():
    listed = subprocess.run(
        ["nsenter", f"--net={netns}", "nft", "list", "chain", "ip", "kube-proxy", "nat-prerouting"],
        capture_output=True, text=True, check=True).stdout.split()
    return int(listed[listed.index("packets") + 1])
def histogram(name, labels, edge, count):
    return "".join(f'{name}_bucket{{{labels},le="{le}"}} {value}\\n'
        for le, value in ((edge / 2, 0), (edge, count), ("+Inf", count)))
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        body = "ok"
        if self.path == "/metrics":
            n = counted()
            rewrites = 5 if n else 0  # the demo's changes are over when it looks after its connections
            body = histogram("kptrace_lookup_duration_seconds", LABELS, 2e-06, n)
            body += f'kptrace_lookup_duration_seconds_count{{{LABELS}}} {n}\\n'
            body += f'kptrace_service_lookup_duration_seconds_count{{dataplane="nftables",service_name="web-00000"}} {n}\\n'
            rewrite = 'dataplane="nftables",table="kube-proxy",outcome="committed"'
            body += histogram("kptrace_rewrite_duration_seconds", rewrite, 0.001, rewrites)
            body += f'kptrace_rewrite_objects_total{{dataplane="nftables",table="kube-proxy"}} {rewrites * 7}\\n'
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body.encode())
    def log_message(self, *arguments): pass
server = HTTPServer(("127.0.0.1", 0), Handler)
open(ready, "w").write(str(server.server_port))
server.serve_forever()
"""


def fake_daemon(request: DaemonRequest) -> list[str]:
    """The command of the stand-in."""
    assert "web-00000" in request.identity_file.read_text()
    return [sys.executable, "-c", FAKE_DAEMON, str(request.netns), str(request.ready_file)]


def test_the_demo_puts_what_it_sent_beside_what_was_counted() -> None:
    """The whole run with a stand-in for the daemon: rows, progress, `keep`, and nothing left."""
    progress: list[str] = []
    kept: list[Kept] = []
    options = DemoOptions(
        dataplanes=(DataPlane.NFTABLES,),
        sizes=(10, 30),
        connections=101,
        changes=5,
        command=fake_daemon,
        keep=kept.append,
    )
    result = run_demo(options, progress.append)
    assert [(row.services, row.sent, row.counted) for row in result.lookup] == [
        (10, 101, 101),
        (30, 101, 101),
    ]
    assert all(1000 <= row.p50_ns <= row.p99_ns <= 2000 for row in result.lookup)
    assert [(row.writes, row.made, row.objects) for row in result.rewrite] == [(5, 5, 35), (5, 5, 35)]
    assert result.exact
    assert [one.result for one in kept] == [result]
    assert any(line.startswith("[2/2] nftables, 30 services") for line in progress)
    assert result.metrics[0].startswith("kptrace_lookup_duration_seconds_count{")
    assert any('service_name="web-00000"' in line for line in result.metrics)
    assert own_namespaces() == []


def test_a_daemon_that_ends_at_once_is_quoted() -> None:
    """The demo fails with what the daemon said last, and leaves nothing behind."""

    def broken(_request: DaemonRequest) -> list[str]:
        return [sys.executable, "-c", "import sys; sys.exit('no netfilter links here')"]

    options = DemoOptions(dataplanes=(DataPlane.NFTABLES,), sizes=(3,), command=broken)
    with pytest.raises(KptraceError, match="exit code 1: no netfilter links here"):
        run_demo(options, lambda _text: None)
    assert own_namespaces() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_leaves_nothing_behind(tmp_path: Path, number: signal.Signals) -> None:
    """Ctrl-C, pressed twice, or SIGTERM while the daemon runs ends the run, the daemon and every namespace."""
    code = (
        "import sys, time\nfrom kptrace.experiments.demo import DemoOptions, run_demo\n"
        "from kptrace.model.netfilter import DataPlane\n"
        "def command(request):\n"
        "    return [sys.executable, '-c', 'import os, sys, time; "
        'open(sys.argv[1], "w").write(str(os.getpid())); time.sleep(600)\', sys.argv[1]]\n'
        "run_demo(DemoOptions(dataplanes=(DataPlane.NFTABLES,), sizes=(3,), command=command), print)\n"
    )
    told = tmp_path / "pid"
    child = subprocess.Popen([sys.executable, "-c", code, str(told)], stderr=subprocess.PIPE, text=True)
    with child:
        deadline = time.monotonic() + 30
        while not (told.exists() and told.read_text()) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert len(own_namespaces(child.pid)) == 3
        child.send_signal(number)
        child.send_signal(number)
        _, said = child.communicate(timeout=30)
    assert "KeyboardInterrupt" in said
    assert own_namespaces(child.pid) == []
    assert not Path("/proc", told.read_text()).exists()
