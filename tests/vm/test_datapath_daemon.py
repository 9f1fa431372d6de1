# SPDX-License-Identifier: Apache-2.0
"""The image's daemon beside a Cilium-shaped datapath with real traffic: each run a sample, by tracing programs."""

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kptrace.experiments import traffic
from kptrace.experiments.cilium_process import AgentProcess, AgentRequest
from kptrace.experiments.daemon_process import DaemonProcess, DaemonRequest, default_command
from kptrace.experiments.manifests import identity_text
from kptrace.experiments.node import EmbeddedNode
from kptrace.experiments.scrape import Scrape, fetch
from kptrace.experiments.services import make_services
from kptrace.kernel.objects import open_program, program_info
from kptrace.kernel.run_statistics import RunStatistics
from kptrace.model.netfilter import IpFamily
from tests.vm.daemons import READY_SECONDS

SERVICES, CONNECTIONS = 23, 101
LOOKUP, UNPAIRED = "kptrace_lookup_duration_seconds", "kptrace_lookup_unpaired_total"
CHAINS = {"from_container": "cil_from_container", "to_container": "cil_to_container"}

pytestmark = [pytest.mark.promised("datapath_lookup", "fentry"), pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def node() -> Iterator[EmbeddedNode]:
    """A node with a rule of kube-proxy's kind beside the datapath: one in transition."""
    subprocess.run(["modprobe", "-a", "nf_tables", "nft_chain_nat"], check=True)
    with EmbeddedNode() as made:
        made.node.run(["nft", "add table ip t"])
        made.node.run(["nft", "add chain ip t c { type filter hook forward priority 0; }"])
        made.node.run(["nft", "add rule ip t c counter"])
        yield made


@pytest.fixture(scope="module")
def agent(node: EmbeddedNode) -> Iterator[AgentProcess]:
    """An agent that has written its Services."""
    with AgentProcess(node.node, AgentRequest(sockets=False)) as started:
        started.install(make_services(SERVICES, 2))
        yield started


@pytest.fixture(scope="module")
def daemon(
    node: EmbeddedNode, agent: AgentProcess, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[DaemonProcess]:
    """The daemon, once it traces the datapath's programs."""
    folder = tmp_path_factory.mktemp("daemon")
    request = DaemonRequest(node.node.path, folder / "identity.json", folder / "ready")
    request.identity_file.write_text(identity_text(agent.services))
    argv = ["kptrace", *default_command(request)[3:], "--bpffs-root", str(agent.root), "--sample", "all"]
    with DaemonProcess(argv, request.ready_file, folder / "log", ready_seconds=READY_SECONDS) as process:
        until(
            lambda: (
                traced(process.scrape()) >= len(CHAINS)
                and "starting" not in {row["reason"] for row in states(process)}
            ),
            lambda: f"{states(process)}",
        )
        yield process
    assert "Traceback" not in (folder / "log").read_text()


def until(condition: Callable[[], bool], detail: Callable[[], str] = str) -> None:
    """Wait for a condition."""
    ends = time.monotonic() + READY_SECONDS
    while not condition():
        assert time.monotonic() < ends, detail()
        time.sleep(0.5)


def traced(scrape: Scrape) -> int:
    """Programs that are traced."""
    return round(
        sum(scrape.total("kptrace_lookup_programs", chain=chain, state="measured") for chain in CHAINS)
    )


def states(process: DaemonProcess) -> list[dict[str, str]]:
    """What /status says of each mechanism."""
    found: list[dict[str, str]] = json.loads(fetch(process.port, "/status?format=json")[1])["signals"]
    return found


def kernel_runs(agent: AgentProcess) -> dict[str, int]:
    """Runs of the programs of `CHAINS` by the kernel's own count."""
    found = {}
    for chain, name in CHAINS.items():
        fd = open_program(agent.programs[name])
        assert fd is not None
        try:
            found[chain] = program_info(fd).run_count
        finally:
            os.close(fd)
    return found


def settled(daemon: DaemonProcess, agent: AgentProcess) -> tuple[dict[str, int], Scrape]:
    """The kernel's runs and the daemon's samples at a moment around which nothing ran."""
    for _ in range(50):
        before = kernel_runs(agent)
        scrape = daemon.scrape()
        if kernel_runs(agent) == before:
            return before, scrape
        time.sleep(0.5)
    raise AssertionError("packets never end")


def counted(scrape: Scrape, chain: str) -> int:
    """Samples and losses of one kind of program."""
    labels = {"dataplane": "cilium", "mechanism": "fentry", "table": "bpf", "chain": chain}
    hook = "tc_ingress" if chain == "from_container" else "tc_egress"
    return scrape.distribution(LOOKUP, **labels).count + round(scrape.total(UNPAIRED, hook=hook))


def test_each_run_is_a_sample_beside_the_rules(
    daemon: DaemonProcess, node: EmbeddedNode, agent: AgentProcess
) -> None:
    """Samples and losses are the runs that the kernel counts; look-ups in rules are beside them where measured."""
    with RunStatistics():
        before, told = settled(daemon, agent)
        sources = traffic.client_sources(IpFamily.IPV4)
        chosen = traffic.targets([service.address for service in agent.services], CONNECTIONS)
        assert traffic.tcp_connections(node.client, chosen, sources).total == CONNECTIONS
        after, now = settled(daemon, agent)
    runs = {chain: after[chain] - before[chain] for chain in CHAINS}
    assert min(runs.values()) >= CONNECTIONS
    assert {chain: counted(now, chain) - counted(told, chain) for chain in CHAINS} == runs
    rules = [
        row["mechanism"] for row in states(daemon) if row["signal"] == "lookup" and row["state"] == "active"
    ]
    print(f"look-ups in rules by {rules}")
    if rules:
        assert now.distribution(LOOKUP, dataplane="nftables").count > 0
    print(
        {chain: now.distribution(LOOKUP, chain=chain, dataplane="cilium").quantile(0.5) for chain in CHAINS}
    )


def test_replaced_programs_are_traced_again(
    daemon: DaemonProcess, node: EmbeddedNode, agent: AgentProcess
) -> None:
    """After a regeneration the new programs' runs are samples too, and the descriptors are as many as before."""
    folder = Path(f"/proc/{daemon.pid}/fd")
    before = len(list(folder.iterdir()))
    old = dict(agent.programs)
    agent.regenerate()
    assert old.items().isdisjoint(agent.programs.items())
    labels = {"dataplane": "cilium", "chain": "from_container"}
    sources = traffic.client_sources(IpFamily.IPV4)
    sources.take()
    addresses = [service.address for service in agent.services]

    def grows() -> bool:
        count = daemon.scrape().distribution(LOOKUP, **labels).count
        traffic.tcp_connections(node.client, traffic.targets(addresses, 1), later)
        time.sleep(0.2)
        return daemon.scrape().distribution(LOOKUP, **labels).count > count

    later = traffic.client_sources(IpFamily.IPV4, 40)
    for _ in range(2000):
        later.take()
    until(grows)
    until(
        lambda: len(list(folder.iterdir())) <= before,
        lambda: f"{before} {sorted(map(os.readlink, folder.iterdir()))}",
    )
