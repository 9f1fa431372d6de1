# SPDX-License-Identifier: Apache-2.0
"""First packets to external addresses, by the Service that the identity file says they are for."""

import time
from pathlib import Path

import pytest

from kptrace.experiments import traffic
from kptrace.experiments.manifests import identity_text
from kptrace.experiments.node import EmbeddedNode
from kptrace.experiments.rulesets import DATA_PLANES, nat_chain
from kptrace.experiments.services import make_services
from kptrace.experiments.writer import RuleWriter
from kptrace.identity.source import Identity, IdentitySettings
from kptrace.kernel.bytecode import Bytecode
from kptrace.model.identity import Snapshot
from kptrace.model.netfilter import DataPlane, Hook, IpFamily
from tests.native.lookup_bench import LookupBench

TO_CLUSTER_IP, TO_EXTERNAL = 11, 23


def snapshot_of(manifest: Path) -> Snapshot:
    """What the daemon makes of an identity file."""
    identity = Identity.open(IdentitySettings(file=manifest))
    identity.start()
    try:
        deadline = time.monotonic() + 10
        while not identity.ready and time.monotonic() < deadline:
            identity.poll()
            time.sleep(0.01)
        return identity.snapshot()
    finally:
        identity.close()


@pytest.mark.parametrize("family", IpFamily)
@pytest.mark.parametrize("dataplane", DATA_PLANES)
def test_first_packets_to_either_address_are_those_of_the_service(
    lookup_bytecode: Bytecode, tmp_path: Path, dataplane: DataPlane, family: IpFamily
) -> None:
    """N connections to the cluster IP and M to the external address are N + M of the Service, and of the chain."""
    services = make_services(7, family=family, external_every=3)
    external = [service.external for service in services if service.external is not None]
    chosen = [service.address for service in services] * TO_CLUSTER_IP + external * TO_EXTERNAL
    wanted = {
        service.port.name: TO_CLUSTER_IP + (TO_EXTERNAL if service.external is not None else 0)
        for service in services
    }
    manifest = tmp_path / "identity.json"
    manifest.write_text(identity_text(services), encoding="utf-8")
    with EmbeddedNode() as node:
        writer = RuleWriter(node.node, dataplane, family)
        writer.install(services)
        bench = LookupBench(lookup_bytecode, node.node)
        try:
            bench.signal.set_identity(snapshot_of(manifest))
            sent = traffic.tcp_connections(node.client, chosen, traffic.client_sources(family))
            for timer in bench.timers.calls:  # Services get their names
                timer()
            table, chain = nat_chain(dataplane, Hook.PREROUTING)
            measured = bench.count(table=table, chain=chain, walk="first", family=family)
            assert measured == sent.total == writer.first_packets(Hook.PREROUTING) == sum(wanted.values())
            assert bench.services() == wanted
            assert sum(bench.unpaired().values()) == 0
        finally:
            bench.close()
