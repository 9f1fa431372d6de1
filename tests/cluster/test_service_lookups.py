# SPDX-License-Identifier: Apache-2.0
"""Look-ups by Service, under the rules of the real kube-proxy and with names from the real API server."""

import random
from collections import Counter
from pathlib import Path

import pytest

from kptrace.experiments import manifests
from kptrace.experiments.node import EmbeddedNode
from kptrace.experiments.services import make_services
from kptrace.experiments.traffic import client_sources, node_sources, tcp_connections
from kptrace.identity.resources import Level
from kptrace.identity.source import Identity, IdentitySettings
from kptrace.kernel.bytecode import Bytecode
from kptrace.kernel.compile import Compiler
from kptrace.model.netfilter import IpFamily
from kptrace.signals.lookup_kernel import REQUEST
from tests.cluster.controlplane import ControlPlane
from tests.cluster.kptrace import kptrace_kubeconfig
from tests.cluster.kubeproxy import KubeProxy, Mode, Settings
from tests.cluster.programs import wait_for
from tests.cluster.rules import installed
from tests.native.lookup_bench import LookupBench

_SERVICES, _CHOSEN = 300, 200
_MOST = 7


@pytest.fixture(scope="session")
def bytecode() -> Bytecode:
    """The lookup programs, compiled once."""
    return Compiler(Path("/sys/kernel/btf/vmlinux"), None).build(REQUEST)


@pytest.mark.parametrize("mode", Mode)
def test_each_service_counts_its_connections(
    mode: Mode, plane: ControlPlane, kube_namespace: str, bytecode: Bytecode, tmp_path: Path
) -> None:
    """Of 200 random Services of 300 each has exactly the connections made to it, from a pod's network and the node's."""
    specs = make_services(_SERVICES, 2, namespace=kube_namespace)
    plane.client.create_all(manifests.objects(specs))
    identity = Identity.open(
        IdentitySettings(Level.SERVICES, kubeconfig=kptrace_kubeconfig(plane), start_delay=0.0)
    )
    rng = random.Random(mode.value)
    with EmbeddedNode() as node, KubeProxy(plane, node.node, tmp_path, Settings(mode)):
        names = {spec.full_name for spec in specs}
        wait_for(lambda: names <= installed(node.node, mode).keys(), "all rules", seconds=60.0)
        identity.start()
        bench = LookupBench(bytecode, node.node, named_services=_SERVICES)
        try:
            wait_for(lambda: (identity.poll(), identity.ready)[1], "names")
            bench.signal.set_identity(identity.snapshot())
            expected: Counter[str] = Counter()
            by_address = {spec.address: spec.port.name for spec in specs}
            ways = ((node.client, client_sources(IpFamily.IPV4)), (node.node, node_sources(IpFamily.IPV4)))
            chosen = rng.sample(specs, _CHOSEN)
            for namespace, sources in ways:
                targets = [spec.address for spec in chosen for _ in range(rng.randint(1, _MOST))]
                rng.shuffle(targets)
                sent = tcp_connections(namespace, targets, sources)
                expected.update({by_address[address]: count for address, count in sent.services.items()})
            for call in bench.timers.calls:
                call()
            assert len(expected) == _CHOSEN
            assert bench.services() == dict(expected)
            print(
                f"{mode}: {expected.total()} connections to {_CHOSEN} Services; unpaired {bench.unpaired()}"
            )
        finally:
            bench.close()
            identity.close()
