# SPDX-License-Identifier: Apache-2.0
"""The experiments' own Cilium on old kernels and new: what it attaches with differs, what it does not."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from kptrace.experiments import traffic
from kptrace.experiments.cilium_cgroup import cgroup_root
from kptrace.experiments.cilium_process import AgentProcess, AgentRequest
from kptrace.experiments.node import EmbeddedNode
from kptrace.experiments.services import make_services
from kptrace.kernel.objects import open_program, program_ids, program_info
from kptrace.kernel.run_statistics import RunStatistics
from kptrace.model.errors import UnsupportedError
from kptrace.model.netfilter import IpFamily

CONNECTIONS = 101


@pytest.fixture
def cgroups() -> Iterator[None]:
    """A mounted cgroup2: a test machine's first program mounts none."""
    try:
        cgroup_root()
        yield
        return
    except UnsupportedError:
        where = Path("/sys/fs/cgroup")
    subprocess.run(["mount", "-t", "cgroup2", "none", where], check=True)
    yield
    subprocess.run(["umount", where], check=True)


def runs(program: int) -> int:
    """How often the program ran while there were statistics."""
    fd = open_program(program)
    assert fd is not None
    try:
        return program_info(fd).run_count
    finally:
        os.close(fd)


@pytest.mark.usefixtures("cgroups")
def test_traffic_is_translated_and_counted() -> None:
    """By tc, XDP and connect(): each answered; the sockets' programs ran once each; new programs take over; all goes."""
    services = make_services(31, 3, external_every=2)
    inside = [service.address for service in services]
    outside = [service.external for service in services if service.external is not None]
    sources = traffic.client_sources(IpFamily.IPV4)

    def send(addresses: list[object]) -> None:
        chosen = traffic.targets(addresses, CONNECTIONS)  # type: ignore[arg-type]
        sent = traffic.tcp_connections(node.client, chosen, sources)
        assert sum(sent.endpoints.values()) == CONNECTIONS

    with EmbeddedNode() as node, AgentProcess(node.node, AgentRequest(xdp=True)) as agent, RunStatistics():
        agent.install(services)
        send([*inside])
        packets = runs(agent.programs["cil_from_container"])
        assert packets >= 2 * CONNECTIONS
        send([*outside])
        assert runs(agent.programs["cil_xdp_entry"]) >= packets + 2 * CONNECTIONS
        assert agent.cgroup is not None
        with agent.cgroup.joined():
            send([*inside])
        assert runs(agent.programs["cil_sock4_connect"]) == CONNECTIONS
        old = set(agent.programs.values())
        agent.regenerate()
        new = set(agent.programs.values())
        assert not old & new
        send([*inside, *outside])
        assert runs(agent.programs["cil_from_container"]) >= 2 * CONNECTIONS
    assert not new & set(program_ids())
