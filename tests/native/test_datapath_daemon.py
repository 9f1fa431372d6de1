# SPDX-License-Identifier: Apache-2.0
"""The daemon beside a Cilium-shaped datapath with real traffic: runs, map writes and inventory in one /metrics."""

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kptrace.experiments import traffic
from kptrace.experiments.cilium_process import AgentProcess
from kptrace.experiments.daemon_process import DaemonProcess, DaemonRequest, default_command
from kptrace.experiments.manifests import identity_text
from kptrace.experiments.node import EmbeddedNode
from kptrace.experiments.scrape import Scrape, fetch
from kptrace.experiments.services import make_services
from kptrace.model.netfilter import IpFamily

SERVICES, CONNECTIONS = 23, 101
RUNS, SECONDS = "kptrace_bpf_program_runs_total", "kptrace_bpf_program_run_seconds_total"
CHAINS = {"from_container": "cil_from_container", "to_container": "cil_to_container"}


@pytest.fixture
def node() -> Iterator[EmbeddedNode]:
    """A node."""
    with EmbeddedNode() as made:
        yield made


@pytest.fixture
def agent(node: EmbeddedNode) -> Iterator[AgentProcess]:
    """An agent that has written its Services."""
    with AgentProcess(node.node) as started:
        started.install(make_services(SERVICES, 2))
        yield started


@pytest.fixture
def daemon(node: EmbeddedNode, agent: AgentProcess, tmp_path: Path) -> Iterator[DaemonProcess]:
    """A daemon that has begun all it can; it never writes a traceback."""
    request = DaemonRequest(node.node.path, tmp_path / "identity.json", tmp_path / "ready")
    request.identity_file.write_text(identity_text(agent.services))
    argv = [*default_command(request), "--bpffs-root", str(agent.root), "--bpf-statistics", "always"]
    argv += ["--cache-dir", str(tmp_path / "cache")]
    with DaemonProcess(argv, request.ready_file, tmp_path / "log") as process:
        until(lambda: "starting" not in {row["reason"] for row in states(process).values()})
        until(lambda: bool(process.scrape().lines(RUNS)))
        yield process
    assert "Traceback" not in (tmp_path / "log").read_text()


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait for a condition."""
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, "it never came"
        time.sleep(0.1)


def states(process: DaemonProcess) -> dict[tuple[str, str], dict[str, str]]:
    """What /status says of each mechanism."""
    rows = json.loads(fetch(process.port, "/status?format=json")[1])["signals"]
    return {(row["signal"], row["mechanism"]): row for row in rows}


def by_bpftool(agent: AgentProcess) -> dict[str, tuple[int, int]]:
    """Runs and their time in ns of the programs of `CHAINS`, as bpftool tells them."""
    found = {}
    for chain, name in CHAINS.items():
        argv = ["bpftool", "-j", "prog", "show", "id", str(agent.programs[name])]
        row = json.loads(subprocess.run(argv, capture_output=True, check=True).stdout)
        found[chain] = row.get("run_cnt", 0), row.get("run_time_ns", 0)
    return found


def settled(daemon: DaemonProcess, agent: AgentProcess) -> tuple[dict[str, tuple[int, int]], Scrape]:
    """Both accounts at a moment around which nothing ran, for longer than the daemon's own tick."""
    for _ in range(50):
        before = by_bpftool(agent)
        time.sleep(1.2)
        scrape = daemon.scrape()
        if by_bpftool(agent) == before:
            return before, scrape
    raise AssertionError("packets never end")


def test_runs_and_their_mean_are_bpftools(
    daemon: DaemonProcess, node: EmbeddedNode, agent: AgentProcess
) -> None:
    """Where tracing programs are refused: counts and times equal, and the state says degraded, and why."""
    row = states(daemon)["datapath_lookup", "bpf_stats"]
    assert (row["state"], row["reason"]) == ("degraded", "tracing_refused")
    assert "EPERM" in row["detail"]
    before, told = settled(daemon, agent)
    sources = traffic.client_sources(IpFamily.IPV4)
    chosen = traffic.targets([service.address for service in agent.services], CONNECTIONS)
    assert traffic.tcp_connections(node.client, chosen, sources).total == CONNECTIONS
    after, now = settled(daemon, agent)
    runs = {chain: after[chain][0] - before[chain][0] for chain in CHAINS}
    assert min(runs.values()) >= CONNECTIONS
    for chain in CHAINS:
        assert now.total(RUNS, chain=chain, dataplane="cilium") - told.total(RUNS, chain=chain) == runs[chain]
        took = now.total(SECONDS, chain=chain) - told.total(SECONDS, chain=chain)
        assert took == pytest.approx((after[chain][1] - before[chain][1]) / 1e9, rel=1e-6)


def test_what_the_agent_writes_is_counted(daemon: DaemonProcess, agent: AgentProcess) -> None:
    """Each change of an endpoint is one rewrite by cilium-agent, and its map entries are those that it says it wrote."""
    name, changes = "kptrace_rewrite_duration_seconds", 7
    labels = {"dataplane": "cilium", "writer": "cilium-agent", "outcome": "committed"}
    before = daemon.scrape()
    updates = 0
    for step in range(changes):
        updates += agent.churn(1, seed=step).written.updates
        time.sleep(0.05)  # far more than the pause that ends a burst
    after = daemon.scrape_until(
        lambda scrape: (
            scrape.distribution(name, **labels).since(before.distribution(name, **labels)).count >= changes
        )
    )
    assert after.distribution(name, **labels).since(before.distribution(name, **labels)).count == changes
    objects = {"dataplane": "cilium", "object": "map_entry", "operation": "add"}
    written = "kptrace_rewrite_objects_total"
    assert after.total(written, **objects) - before.total(written, **objects) == updates


def test_inventory_counts_what_is_in_the_maps(daemon: DaemonProcess) -> None:
    """Services and back ends are those that were installed, and forwarded packets have a direction."""
    scrape = daemon.scrape_until(
        lambda now: now.total("kptrace_datapath_services", family="ipv4") == SERVICES, seconds=40.0
    )
    assert scrape.total("kptrace_datapath_services", family="ipv4") == SERVICES
    assert scrape.total("kptrace_datapath_backends", family="ipv4") == 2 * SERVICES
    assert scrape.total("kptrace_datapath_agent_up") == 1
