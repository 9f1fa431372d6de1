# SPDX-License-Identifier: Apache-2.0
"""Kube-proxy-shaped rules read back from the kernel, against what was written and what nft lists."""

import json

import pytest

from kptrace.dataplanes.installed_services import Installed, read_installed
from kptrace.dataplanes.nftables.dump import open_channel
from kptrace.dataplanes.nftables.service_dump import ServiceDump
from kptrace.experiments.netns import Namespace
from kptrace.experiments.node import EmbeddedNode
from kptrace.experiments.services import make_services
from kptrace.experiments.writer import RuleWriter
from kptrace.model.identity import Protocol, ServicePort
from kptrace.model.netfilter import DataPlane, IpFamily

SERVICES = 23


def read(namespace: Namespace, family: IpFamily = IpFamily.IPV4) -> list[Installed]:
    """What one reading finds."""

    def body() -> list[Installed]:
        with open_channel() as channel:
            return [each for each in read_installed(ServiceDump(channel), family) if each is not None]

    return namespace.call(body)


@pytest.mark.parametrize("dataplane", [DataPlane.NFTABLES, DataPlane.IPTABLES_NFT])
def test_every_endpoint_is_found_and_no_other(dataplane: DataPlane) -> None:
    """Each Service port has exactly its endpoints; one more lacks; one less is besides, where names tell."""
    services = make_services(SERVICES, 3)
    with EmbeddedNode() as node:
        RuleWriter(node.node, dataplane).install(services)
        (installed,) = read(node.node)
        assert installed.dataplane is dataplane
        for service in services:
            ends = {(end.ip, end.port) for end in service.endpoints}
            assert len(ends) == 3
            assert installed.present(service.port)
            assert not installed.lacking(service.port, ends)
            assert not installed.besides(service.port, ends)
            more = ends | {("10.99.0.1", 8080)}
            assert installed.lacking(service.port, more) == {("10.99.0.1", 8080)}
            gone = set(list(ends)[1:])
            known = dataplane is DataPlane.NFTABLES
            assert installed.besides(service.port, gone) == (ends - gone if known else set())
        assert not installed.present(ServicePort("ns", "nobody", "http", Protocol.TCP))
        listed = json.loads(node.node.run(["nft", "-j", "list", "chains"]))
        names = [each["chain"]["name"] for each in listed["nftables"] if "chain" in each]
        assert (
            sum((name.startswith("service-") and "/" in name) or "KUBE-SVC-" in name for name in names)
            == SERVICES
        )


def test_a_node_without_kube_proxy_has_nothing(namespace: Namespace) -> None:
    """Foreign tables are no Services."""
    namespace.run(["nft", "add table ip kube-procks; add chain ip kube-procks service-x"])
    assert read(namespace) == []
    assert read(namespace, IpFamily.IPV6) == []
