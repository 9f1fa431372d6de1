# SPDX-License-Identifier: Apache-2.0
"""The experiments' own Cilium on the machine's kernel: real traffic, counted by the kernel, bpftool and the devices."""

import json
import os
import re
import signal
import socket
import struct
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from kptrace.experiments import traffic
from kptrace.experiments.cilium_cgroup import cgroup_root
from kptrace.experiments.cilium_datapath import CALLS
from kptrace.experiments.cilium_layouts import GLOBALS, LAYOUTS, MapName, Version
from kptrace.experiments.cilium_process import AgentProcess, AgentRequest
from kptrace.experiments.node import EmbeddedNode
from kptrace.experiments.services import ServiceSpec, change_endpoint, make_services
from kptrace.experiments.traffic import Sent
from kptrace.kernel.run_statistics import RunStatistics
from kptrace.model.errors import KptraceError
from kptrace.model.identity import Protocol, ServiceAddress
from kptrace.model.netfilter import IpFamily
from kptrace.model.rewrite import ProcessRun
from kptrace.signals.writers import Writers
from tests.native.bpf_lists import bpftool, entries, ids, run_count

Start = Callable[..., AgentProcess]
CONNECTIONS = 101
EGRESS, INGRESS, SERVICE = 2, 1, 3
PROGRAMS = (
    *("cil_from_container", "tail_handle_ipv4", "cil_to_container", "tail_ipv4_to_endpoint"),
    *("cil_from_netdev", "cil_xdp_entry"),
    *(f"cil_sock{v}_{call}" for v in "46" for call in ("connect", "sendmsg", "recvmsg", "getpeername")),
)
WRITTEN = (MapName.SERVICES4, MapName.BACKENDS4, MapName.REVERSE_NAT4)
SERVICES = list(make_services(31, 3, external_every=2))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Programs compiled once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def node() -> Iterator[EmbeddedNode]:
    """One node for all tests: each has an agent of its own on it."""
    with EmbeddedNode() as made:
        yield made


@pytest.fixture
def start(node: EmbeddedNode, cache: Path) -> Iterator[Start]:
    """Start an agent on the node; afterwards nothing of it is left: no program, no map, no link, no pin, no cgroup."""
    started: list[AgentProcess] = []

    def begin(**request: object) -> AgentProcess:
        agent = AgentProcess(node.node, AgentRequest(cache=cache, **request))  # type: ignore[arg-type]
        started.append(agent.__enter__())
        return agent

    yield begin
    programs = {program for agent in started for program in agent.programs.values()}
    # Without the map of tail calls, which the kernel may keep: see `ids`.
    pins = [p for agent in started for p in (agent.root / GLOBALS).glob("cilium_*") if p.name != CALLS]
    maps = {bpftool("map", "show", "pinned", str(pin))["id"] for pin in pins}
    for agent in started:
        agent.close()
        assert not agent.root.exists()
        assert agent.cgroup is None or not agent.cgroup.path.exists()

    def nothing_left() -> bool:
        holders = {link.get("prog_id") for link in bpftool("link", "list")}
        return not (programs & ids("prog") or maps & ids("map") or programs & holders)

    assert wait_for(nothing_left)


def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Whether it comes true in time: the kernel frees what nobody holds a little later."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def metrics(agent: AgentProcess) -> Counter[tuple[int, int, int]]:
    """Packets by reason, direction and file."""
    counts: Counter[tuple[int, int, int]] = Counter()
    for key, values in entries(agent.root / GLOBALS / MapName.METRICS).items():
        reason, direction, _, file = struct.unpack("<BBHB3x", key)
        counts[reason, direction, file] += sum(count for count, _ in struct.iter_unpack("<QQ", values))
    return counts


def arrived(node: EmbeddedNode, device: str) -> int:
    """Packets that a device of the node received."""
    shown = json.loads(node.node.run(["ip", "-s", "-j", "link", "show", "dev", device]))
    return int(shown[0]["stats64"]["rx"]["packets"])


def in_map(agent: AgentProcess, name: MapName) -> dict[bytes, bytes]:
    """Entries of one of the agent's maps."""
    return entries(agent.root / GLOBALS / LAYOUTS[Version.CURRENT][name].name)


def assert_right_back_ends(sent: Sent, services: list[ServiceSpec]) -> None:
    """Each Service's connections were answered by its own back ends, and by more than one where there are enough."""
    for service in services:
        own = [f"{endpoint.ip} {endpoint.port}" for endpoint in service.endpoints]
        made = sum(sent.services.get(address, 0) for address in service.addresses)
        assert sum(sent.endpoints.get(each, 0) for each in own) == made
    assert sum(sent.endpoints.values()) == sent.total
    assert len(sent.endpoints) > len(services)


def addresses(services: list[ServiceSpec], *, external: bool = False) -> list[ServiceAddress]:
    """Where the Services are reached: from inside, or from outside those that are."""
    return [each for s in services if (each := s.external if external else s.address) is not None]


@pytest.mark.parametrize("version", Version)
@pytest.mark.parametrize("attach", ["tcx", "clsact"])
def test_connections_are_answered_by_the_right_back_end(
    node: EmbeddedNode, start: Start, attach: str, version: Version
) -> None:
    """101 connections by each of the three ways, with each version's maps: tc, XDP (external addresses), connect()."""
    agent = start(attach=attach, xdp=True, version=version)
    agent.install(SERVICES)
    sources = traffic.client_sources(IpFamily.IPV4)

    def send(*, external: bool) -> Sent:
        chosen = traffic.targets(addresses(SERVICES, external=external), CONNECTIONS)
        return traffic.tcp_connections(node.client, chosen, sources)

    for external in (False, True):
        assert_right_back_ends(send(external=external), SERVICES)
    assert metrics(agent)[0, SERVICE, 4] >= 2 * CONNECTIONS  # a connection has more packets than one
    assert agent.cgroup is not None
    with agent.cgroup.joined():
        assert_right_back_ends(send(external=False), SERVICES)
    # Of each connection that was translated on its way the Service's entry and the connection's; none of the sockets'.
    flags = Counter(key[13] for key in in_map(agent, MapName.CT4))
    assert flags == {0: 2 * CONNECTIONS, 4: 2 * CONNECTIONS}
    assert len(in_map(agent, MapName.SOCKETS4)) == CONNECTIONS
    # The whole names, which only the programs' BTF has.
    names = {program["id"]: program.get("name") for program in bpftool("prog", "list")}
    assert {name: names[program] for name, program in agent.programs.items()} == {n: n for n in PROGRAMS}


def test_connections_to_ipv6_services_are_translated_at_connect(node: EmbeddedNode, start: Start) -> None:
    """The same by `cil_sock6_connect`."""
    services = list(make_services(31, 3, family=IpFamily.IPV6))
    agent = start()
    agent.install(services)
    assert agent.cgroup is not None
    with agent.cgroup.joined(), RunStatistics():
        sent = traffic.tcp_connections(
            node.client,
            traffic.targets(addresses(services), CONNECTIONS),
            traffic.client_sources(IpFamily.IPV6),
        )
        assert run_count(agent.programs["cil_sock6_connect"]) == CONNECTIONS
    assert_right_back_ends(sent, services)


@pytest.mark.parametrize("family", IpFamily)
def test_sockets_hear_of_the_service_only(node: EmbeddedNode, start: Start, family: IpFamily) -> None:
    """Datagrams of an unconnected socket go to a back end and answers come from the Service, as its peer is called."""
    (service,) = make_services(1, 3, family=family, protocol=Protocol.UDP)
    target = (service.address.ip, service.address.port)
    agent = start()
    agent.install([service])
    kind = socket.AF_INET if family is IpFamily.IPV4 else socket.AF_INET6

    def talk() -> None:
        with socket.socket(kind, socket.SOCK_DGRAM) as loose, socket.socket(kind, socket.SOCK_DGRAM) as bound:
            loose.settimeout(traffic.TIMEOUT_SECONDS)
            for number in range(CONNECTIONS):
                loose.sendto(b"%d" % number, target)
                answer, sender = loose.recvfrom(64)
                assert (answer, sender[:2]) == (b"%d" % number, target)
            bound.connect(target)
            assert bound.getpeername()[:2] == target

    assert agent.cgroup is not None
    with agent.cgroup.joined(), RunStatistics():
        node.client.call(talk)
        version = "4" if family is IpFamily.IPV4 else "6"
        runs = {
            name.rsplit("_", 1)[1]: run_count(program)
            for name, program in agent.programs.items()
            if name.startswith(f"cil_sock{version}_")
        }
    assert runs == {"connect": 1, "sendmsg": CONNECTIONS, "recvmsg": CONNECTIONS, "getpeername": 1}


@pytest.mark.parametrize("attach", ["tcx", "clsact"])
def test_runs_are_what_was_sent(node: EmbeddedNode, start: Start, attach: str) -> None:
    """Runs by the kernel's statistics and packets by `cilium_metrics` are those that the devices received."""
    services = list(make_services(13, 2, protocol=Protocol.UDP))
    agent = start(attach=attach)
    agent.install(services)
    chosen = traffic.targets(addresses(services), CONNECTIONS)
    sources = traffic.client_sources(IpFamily.IPV4)
    devices = [arrived(node, device) for device in ("clients", "backends")]
    with RunStatistics():
        before = {name: run_count(program) for name, program in agent.programs.items()}
        counted = metrics(agent)
        devices = [arrived(node, device) for device in ("clients", "backends")]
        sent = traffic.udp_flows(node.client, chosen, sources, datagrams=3)
        after = [arrived(node, device) for device in ("clients", "backends")]
        runs = {name: run_count(program) - before[name] for name, program in agent.programs.items()}
    assert sent.packets == 3 * CONNECTIONS
    received = [end - begin for begin, end in zip(devices, after, strict=True)]
    # Address resolution has packets too, when it is its time.
    assert [runs["cil_from_container"], runs["cil_from_netdev"]] == received
    assert all(0 <= count - sent.packets <= 8 for count in received)
    assert (
        runs["tail_handle_ipv4"] == runs["tail_ipv4_to_endpoint"] == 0
    )  # their time and runs are their callers'
    found = metrics(agent) - counted
    assert found[0, EGRESS, 2] == runs["cil_from_container"]
    assert found[0, INGRESS, 2] == runs["cil_to_container"]
    assert found[0, INGRESS, 1] == runs["cil_from_netdev"]
    assert Counter(key[13] for key in in_map(agent, MapName.CT_ANY4)) == {0: CONNECTIONS, 4: CONNECTIONS}


def test_a_service_without_back_ends_is_dropped_with_its_reason(node: EmbeddedNode, start: Start) -> None:
    """A packet counts as "Service backend not found", a connect() fails and counts as "No backend slot entry found"."""
    (service,) = make_services(1, 1, protocol=Protocol.UDP)
    agent = start()
    agent.install([replace(service, endpoints=())])
    sources = traffic.client_sources(IpFamily.IPV4)
    traffic.udp_flows(node.client, [service.address] * 7, sources, answered=False)
    assert metrics(agent)[158, EGRESS, 2] == 7
    assert agent.cgroup is not None
    with agent.cgroup.joined(), pytest.raises(KptraceError, match="not permitted"):
        traffic.udp_flows(node.client, [service.address], sources, answered=False)
    assert metrics(agent)[5, EGRESS, 5] == 1


@pytest.mark.parametrize("attach", ["tcx", "clsact"])
def test_programs_are_replaced_under_traffic(node: EmbeddedNode, start: Start, attach: str) -> None:
    """Five regenerations lose no connection, give new programs, free the old ones and leak no descriptor."""
    agent = start(attach=attach, xdp=True)
    agent.install(SERVICES)
    chosen = traffic.targets([a for s in SERVICES for a in s.addresses], 997)
    sent: list[Sent] = []
    sender = threading.Thread(
        target=lambda: sent.append(
            traffic.tcp_connections(node.client, chosen, traffic.client_sources(IpFamily.IPV4))
        )
    )
    calls = agent.root / GLOBALS / CALLS
    generations = [dict(agent.programs)]
    maps = [bpftool("map", "show", "pinned", str(calls))["id"]]
    descriptors = len(list(Path(f"/proc/{agent.pid}/fd").iterdir()))
    sender.start()
    for _ in range(5):
        agent.regenerate()
        generations.append(dict(agent.programs))
        maps.append(bpftool("map", "show", "pinned", str(calls))["id"])
    assert sender.is_alive()  # otherwise nothing was replaced under traffic
    sender.join()
    assert sent
    assert sent[0].total == 997
    old = {program for each in generations[:-1] for program in each.values()}
    assert len(old) == 5 * len(agent.programs)
    assert wait_for(lambda: not old & ids("prog"))
    assert set(agent.programs.values()) <= ids("prog")
    assert len(list(Path(f"/proc/{agent.pid}/fd").iterdir())) == descriptors
    assert len(set(maps)) == len(maps)


def test_a_killed_agent_leaves_its_datapath_and_its_pins(node: EmbeddedNode, start: Start) -> None:
    """As with Cilium: connections go on without the agent, until its pins are removed (the fixture sees to that)."""
    agent = start(attach="tcx", xdp=True)
    agent.install(SERVICES)
    programs = set(agent.programs.values())
    os.kill(agent.pid, signal.SIGKILL)
    chosen = traffic.targets(addresses(SERVICES), CONNECTIONS)
    sent = traffic.tcp_connections(node.client, chosen, traffic.client_sources(IpFamily.IPV4))
    assert_right_back_ends(sent, SERVICES)
    assert programs <= ids("prog")
    with pytest.raises(KptraceError, match="the agent ended"):
        agent.install(SERVICES)
    agent.close()
    assert wait_for(lambda: not programs & ids("prog"))


def test_the_agent_is_known_as_such(start: Start, tmp_path: Path) -> None:
    """By its executable in the table of writers; strace sees every write that it says it made, each by one call."""
    agent = start(attach="none", sockets=False)
    executable = str(Path(f"/proc/{agent.pid}/exe").readlink())
    run = ProcessRun(agent.pid, executable=executable)
    assert Writers().classify([run], watched_netns=True) == "cilium-agent"
    assert Path(f"/proc/{agent.pid}/comm").read_text() == "cilium-agent\n"
    agent.install(SERVICES)
    log = tmp_path / "strace"
    with subprocess.Popen(
        ["strace", "-f", "-e", "trace=bpf", "-o", str(log), "-p", str(agent.pid)],
        stderr=subprocess.PIPE,
        text=True,
    ) as tracer:
        assert tracer.stderr is not None
        assert "attached" in tracer.stderr.readline()
        done = agent.replace(4, change_endpoint(SERVICES[4], 1))
        tracer.terminate()
    calls = re.findall(r"bpf\(BPF_MAP_(UPDATE|DELETE)_ELEM", log.read_text())
    assert Counter(calls) == {"UPDATE": done.written.updates, "DELETE": done.written.deletes}
    assert done.written.calls == len(calls)
    assert done.written.masters == len(SERVICES[4].addresses)


@pytest.mark.parametrize("version", Version)
def test_batches_write_the_same_as_single_calls(start: Start, version: Version) -> None:
    """Install and change: the maps have the same entries, by far fewer calls."""
    contents = []
    for batch in (False, True):
        agent = start(attach="none", sockets=False, version=version, batch=batch)
        done = [agent.install(SERVICES).written, agent.churn(29).written]
        pins = [agent.root / GLOBALS / LAYOUTS[version][name].name for name in WRITTEN]
        contents.append([entries(pin) for pin in pins])
        assert batch == (done[0].calls < 10)
        agent.remove()
        assert [entries(pin) for pin in pins] == [{}] * len(pins)
        agent.close()
    assert contents[0] == contents[1]


def test_a_full_map_is_told(start: Start) -> None:
    """The agent survives what the kernel refuses, and says what that was."""
    agent = start(attach="none", sockets=False, entries=7)
    with pytest.raises(KptraceError, match="E2BIG"):
        agent.install(SERVICES)
    agent.remove()
    assert agent.install(SERVICES[1:2]).written.updates == 1 + 2 * 3 + 1


def test_the_joined_cgroup_is_left_again(start: Start) -> None:
    """After the block the process is where it was."""
    agent = start(attach="none")
    before = Path("/proc/self/cgroup").read_text()
    assert agent.cgroup is not None
    assert agent.cgroup.path.parent == cgroup_root()
    with agent.cgroup.joined():
        assert agent.cgroup.path.name in Path("/proc/self/cgroup").read_text()
    assert Path("/proc/self/cgroup").read_text() == before
