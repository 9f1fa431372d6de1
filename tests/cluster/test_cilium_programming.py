# SPDX-License-Identifier: Apache-2.0
"""Programming latency of Cilium's maps against a real API server: every change once, with the call that made it true.

The writer is the experiments' agent, which writes in the order of Cilium's; strace has its system calls.
"""

import json
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from kptrace.experiments import manifests
from kptrace.experiments.cilium_process import AgentProcess, AgentRequest
from kptrace.experiments.netns import Namespace
from kptrace.experiments.services import ServiceSpec, make_services
from kptrace.model.identity import Endpoint
from tests.cluster.bpf_calls import BpfCall, bpf_calls, map_id, traced
from tests.cluster.controlplane import ControlPlane
from tests.cluster.kptrace import Account, Changed, Kptrace
from tests.cluster.kubeproxy import KubeProxy, Mode
from tests.cluster.programs import wait_for
from tests.cluster.setting import ends

SERVICES = 101
MORE = ends(43)
SIGNAL = "datapath_programming"
#: Times in /status are in microseconds.
_ROUNDED_NS = 1000
DURATION = "kptrace_programming_duration_seconds"


class Cluster:
    """Services in the API and in the agent's maps; the first of them is scaled.

    Attributes:
        web: the first one, as it was written last.
    """

    def __init__(self, plane: ControlPlane, agent: AgentProcess, specs: Sequence[ServiceSpec]) -> None:
        self._plane = plane
        self.agent = agent
        self.web = specs[0]
        plane.client.create_all(manifests.objects(specs))
        agent.install(specs)

    def scale(self, endpoints: Sequence[Endpoint]) -> None:
        """Write the EndpointSlice, and have the agent follow."""
        self.web = replace(self.web, endpoints=tuple(endpoints))
        self._plane.client.replace(manifests.objects([self.web])[1])
        self.agent.replace(0, self.web)


@pytest.fixture
def agent(netns: Namespace) -> Iterator[AgentProcess]:
    """An agent that has maps and attaches nothing."""
    with AgentProcess(netns, AgentRequest(attach="none", sockets=False)) as started:
        yield started


@pytest.fixture
def cluster(plane: ControlPlane, kube_namespace: str, agent: AgentProcess) -> Cluster:
    """With one endpoint for each Service."""
    return Cluster(plane, agent, make_services(SERVICES, 1, namespace=kube_namespace))


@pytest.fixture
def kptrace(cluster: Cluster, start_kptrace: Callable[..., Kptrace]) -> Kptrace:
    """It has read the maps."""
    return start_kptrace("--bpffs-root", str(cluster.agent.root), signal=SIGNAL)


def completing(calls: Sequence[BpfCall], change: Changed) -> BpfCall:
    """The one call in which the change's commit stamp lies."""
    found = [
        call
        for call in calls
        if call.begin_ns - _ROUNDED_NS <= change.committed_ns <= call.end_ns + _ROUNDED_NS
    ]
    assert len(found) == 1, (change, found)
    return found[0]


def services_map(agent: AgentProcess) -> int:
    """The id of the map of IPv4 services, by bpftool."""
    pin = agent.root / "tc/globals/cilium_lb4_services_v2"
    shown = subprocess.run(
        ["bpftool", "-j", "map", "show", "pinned", str(pin)], capture_output=True, check=True
    )
    return int(json.loads(shown.stdout)["id"])


def test_one_to_forty_four_in_one_write(kptrace: Kptrace, cluster: Cluster, tmp_path: Path) -> None:
    """43 changes, all by the call that wrote the master entry: the last update of the service map; and 43 back again."""
    agent, alone, before, log = (
        cluster.agent,
        list(cluster.web.endpoints),
        kptrace.account(),
        tmp_path / "strace",
    )
    with traced(agent.pid, log):
        cluster.scale([*alone, *MORE])
        account = kptrace.settle(len(MORE), before)
    assert account == Account(43, 0, {**account.fates, "superseded": 0, "unmeasured": 0})
    changes = kptrace.changes()[-43:]
    assert {(each.kind, each.attribution) for each in changes} == {("endpoint_added", "exact")}
    assert {each.address for each in changes} == {f"{end.ip}:{end.port}" for end in MORE}
    assert {each.service for each in changes} == {f"{cluster.web.full_name}/tcp"}
    calls = bpf_calls(log)
    (call,) = {completing(calls, each) for each in changes}
    wanted = services_map(agent)
    updates = [
        each
        for each in calls
        if each.command == "BPF_MAP_UPDATE_ELEM" and map_id(agent.pid, each.descriptor) == wanted
    ]
    assert len(updates) == 45  # 44 slots and the master entry
    assert call == updates[-1]
    took = sorted(each.milliseconds for each in changes if each.fate == "programmed")
    print(
        f"{account.fates}: {took[:1]} to {took[-1:]} ms; the call took at most {call.end_ns - call.begin_ns} ns"
    )
    before = kptrace.account()
    cluster.scale(alone)
    assert kptrace.settle(43, before).timed == 43
    assert {each.kind for each in kptrace.changes()[-43:]} == {"endpoint_removed"}


def test_one_to_forty_four_in_43_writes(kptrace: Kptrace, cluster: Cluster, tmp_path: Path) -> None:
    """Each endpoint has its own commit, in the order of the writes, each within one call of the agent's."""
    before, log = kptrace.account(), tmp_path / "strace"
    with traced(cluster.agent.pid, log):
        for each in MORE:
            cluster.scale([*cluster.web.endpoints, each])
        account = kptrace.settle(len(MORE), before)
    assert account == Account(43, 0, {**account.fates, "superseded": 0, "unmeasured": 0})
    changes = sorted(kptrace.changes()[-43:], key=lambda change: change.committed_ns)
    assert [each.address for each in changes] == [f"{end.ip}:{end.port}" for end in MORE]
    calls = bpf_calls(log)
    assert len({completing(calls, each) for each in changes}) == 43


def test_a_service_that_comes_and_goes(kptrace: Kptrace, cluster: Cluster, plane: ControlPlane) -> None:
    """A whole Service port is one change either way."""
    (spec,) = make_services(1, 3, first=5000, namespace=cluster.web.port.namespace)
    before = kptrace.account()
    plane.client.create_all(manifests.objects([spec]))
    cluster.agent.install([*cluster.agent.services, spec])
    assert kptrace.settle(1, before).timed >= 1
    added = {each.kind for each in kptrace.changes() if each.service == f"{spec.full_name}/tcp"}
    assert "service_added" in added


def test_a_node_in_transition_shows_both(
    plane: ControlPlane,
    cluster: Cluster,
    start_kube_proxy: Callable[..., KubeProxy],
    start_kptrace: Callable[..., Kptrace],
) -> None:
    """kube-proxy's rules and Cilium's maps at once: a change has a sample of each, told apart by the data plane alone."""
    start_kube_proxy(Mode.NFTABLES)
    kptrace = start_kptrace("--bpffs-root", str(cluster.agent.root), signal=SIGNAL)

    def samples() -> dict[str, int]:
        scrape = kptrace.scrape()
        early = "kptrace_programming_early_total"
        return {
            plane: scrape.distribution(DURATION, dataplane=plane).count
            + int(scrape.total(early, dataplane=plane))
            for plane in ("nftables", "cilium")
        }

    before = samples()
    cluster.scale([*cluster.web.endpoints, *MORE])
    wait_for(
        lambda: (
            {plane: count - before[plane] for plane, count in samples().items()} == dict.fromkeys(before, 43)
        ),
        "43 samples of each",
        detail=lambda: f"{before} {samples()}",
    )
    scrape = kptrace.scrape()
    for plane_name in ("nftables", "cilium"):
        assert scrape.lines("kptrace_rewrite_duration_seconds_count", dataplane=plane_name)
    for writer in ("kube-proxy", "cilium-agent"):
        assert scrape.lines("kptrace_programming_pending", writer=writer)
