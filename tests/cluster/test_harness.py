# SPDX-License-Identifier: Apache-2.0
"""The harness itself: what is written to the API server becomes rules of the real kube-proxy, in its three modes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from kptrace.experiments import manifests
from kptrace.experiments.netns import Namespace
from kptrace.experiments.services import ServiceSpec, change_endpoint, make_services
from kptrace.model.identity import Endpoint
from tests.cluster.controlplane import ControlPlane
from tests.cluster.kubeproxy import KubeProxy, Mode
from tests.cluster.objects import Port, endpoint_slice, load_balancer, service
from tests.cluster.programs import wait_for
from tests.cluster.rules import Installed, installed

_SERVICES = 23
_ENDPOINTS = 3
_ROOT = Path(__file__).parents[2]
each_mode = pytest.mark.parametrize("mode", Mode)


def _wanted(specs: Iterable[ServiceSpec]) -> Installed:
    """What must be installed for these."""
    return {spec.full_name: frozenset(f"{end.ip}:{end.port}" for end in spec.endpoints) for spec in specs}


def _in(found: Installed, kube_namespace: str) -> Installed:
    """What is installed of one Kubernetes namespace: the API server has a Service of its own in another."""
    return {name: ends for name, ends in found.items() if name.startswith(f"{kube_namespace}/")}


def _runs(pid: int, comm: str) -> bool:
    """Whether this process runs: one that has ended may wait long for somebody to take note."""
    try:
        found = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return f"({comm}) " in found and f"({comm}) Z" not in found


@each_mode
def test_services_become_rules(
    mode: Mode,
    plane: ControlPlane,
    netns: Namespace,
    kube_namespace: str,
    start_kube_proxy: Callable[..., KubeProxy],
) -> None:
    """All Services with all their endpoints become rules of the mode's own kind, and follow what changes."""
    specs = list(make_services(_SERVICES, _ENDPOINTS, namespace=kube_namespace))
    plane.client.create_all(manifests.objects(specs))
    proxy = start_kube_proxy(mode)
    print(f"{mode}: synced {proxy.startup_seconds:.2f} s after its start")
    assert _in(installed(netns, mode), kube_namespace) == _wanted(specs)
    assert proxy.healthy()
    others = [other for other in Mode if other is not mode]
    assert [_in(installed(netns, other), kube_namespace) for other in others] == [{}, {}]

    before, begin = proxy.syncs(), time.time()
    specs[-1] = change_endpoint(specs[-1], step=1)
    plane.client.replace(manifests.objects(specs[-1:])[1])
    print(f"{mode}: an endpoint in {proxy.wait_synced(begin):.2f} s")
    assert _in(installed(netns, mode), kube_namespace) == _wanted(specs)
    assert proxy.syncs() == before + 1  # only the changed family's

    begin = time.time()
    plane.client.delete(manifests.objects(specs[:1])[0])
    proxy.wait_synced(begin)
    assert _in(installed(netns, mode), kube_namespace) == _wanted(specs[1:])
    assert proxy.syncs() > before + 1


def test_every_kind_of_service(
    plane: ControlPlane, netns: Namespace, kube_namespace: str, start_kube_proxy: Callable[..., KubeProxy]
) -> None:
    """Each kind of Service that a test can write is taken by the API server, and is for kube-proxy what it says."""
    end4, end6 = Endpoint("10.244.0.1", 8080, node="node-0"), Endpoint("fd00:244::1", 8080)
    named = {
        "node-port": ("10.96.9.1", "NodePort"),
        "balanced": ("10.96.9.2", "LoadBalancer"),
        "dual": ("10.96.9.3", "ClusterIP"),
        "external": ("10.96.9.4", "ClusterIP"),
        "idle": ("10.96.9.5", "ClusterIP"),
        "headless": ("None", "ClusterIP"),
    }
    more: dict[str, dict[str, object]] = {
        "node-port": {"ports": (Port(node_port=30017),)},
        "external": {"external_ips": ("198.51.100.4",)},
    }
    made = {}
    for name, (ip, kind) in named.items():
        ips = (ip, "fd00:96::903") if name == "dual" else (ip,)
        made[name] = plane.client.create(service(name, kube_namespace, *ips, kind=kind, **more.get(name, {})))
        if name != "idle":
            plane.client.create(endpoint_slice(name, kube_namespace, [end4]))
    plane.client.create(endpoint_slice("dual", kube_namespace, [end6], family="IPv6"))
    plane.client.set_status(made["balanced"], load_balancer("203.0.113.2"))
    assert made["headless"]["spec"]["clusterIPs"] == ["None"]

    start_kube_proxy(Mode.NFTABLES)
    has_addresses = named.keys() - {"idle", "headless"}
    ipv4, ipv6 = (_in(installed(netns, Mode.NFTABLES, ipv6=v6), kube_namespace) for v6 in (False, True))
    assert ipv4 == {f"{kube_namespace}/{name}:http": {"10.244.0.1:8080"} for name in has_addresses}
    assert ipv6 == {f"{kube_namespace}/dual:http": {"fd00:244::1:8080"}}
    maps = {
        name: netns.run(["nft", "list", "map", "ip", "kube-proxy", name])
        for name in ("service-ips", "service-nodeports", "no-endpoint-services")
    }
    assert "203.0.113.2 . tcp . 80 : goto external-" in maps["service-ips"]
    assert "198.51.100.4 . tcp . 80 : goto external-" in maps["service-ips"]
    assert "tcp . 30017 : goto external-" in maps["service-nodeports"]
    assert f'10.96.9.5 . tcp . 80 comment "{kube_namespace}/idle:http"' in maps["no-endpoint-services"]


def test_initial_events_are_streamed(plane: ControlPlane, kube_namespace: str) -> None:
    """A watch can begin with all objects and a bookmark after them, which the API server refuses on an old etcd."""
    plane.client.create(service("web", kube_namespace, "10.96.9.1"))
    query = {
        "watch": "true",
        "sendInitialEvents": "true",
        "resourceVersionMatch": "NotOlderThan",
        "allowWatchBookmarks": "true",
        "timeoutSeconds": "1",
    }
    status, events = plane.client.raw("GET", f"/api/v1/namespaces/{kube_namespace}/services", query=query)
    assert status == 200
    assert b'"name":"web"' in events
    assert b'"k8s.io/initial-events-end":"true"' in events


def test_kube_proxy_outlives_the_api_server(
    plane: ControlPlane, netns: Namespace, kube_namespace: str, start_kube_proxy: Callable[..., KubeProxy]
) -> None:
    """While the API server is away kube-proxy keeps its rules, and when it is back at its port, it follows again."""
    specs = list(make_services(2, 1, namespace=kube_namespace))
    plane.client.create_all(manifests.objects(specs))
    start_kube_proxy(Mode.NFTABLES)
    with plane.outage():
        assert _in(installed(netns, Mode.NFTABLES), kube_namespace) == _wanted(specs)
    specs[0] = change_endpoint(specs[0], step=1)
    plane.client.replace(manifests.objects(specs[:1])[1])
    # Its watches are tried again with growing pauses.
    wait_for(
        lambda: _in(installed(netns, Mode.NFTABLES), kube_namespace) == _wanted(specs),
        "the changed endpoint",
        seconds=60.0,
    )


def test_programs_die_with_the_test_run(tmp_path: Path) -> None:
    """A test run that is killed leaves no program behind."""
    script = (
        "from pathlib import Path; from tests.cluster.programs import Program;"
        f"print(Program(['sleep', '600'], Path({str(tmp_path / 'log')!r})).pid, flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=_ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as run:
        assert run.stdout is not None
        pid = int(run.stdout.readline())
        wait_for(lambda: _runs(pid, "sleep"), "the program's start")
        os.kill(run.pid, signal.SIGKILL)
    wait_for(lambda: not _runs(pid, "sleep"), "the program's end")
