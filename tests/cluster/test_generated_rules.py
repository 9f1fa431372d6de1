# SPDX-License-Identifier: Apache-2.0
"""The rules that experiments make beside those that the real kube-proxy writes for the same Services."""

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest

from kptrace.experiments import manifests
from kptrace.experiments.netns import Namespace
from kptrace.experiments.services import ServiceSpec, make_services
from kptrace.experiments.writer import RuleWriter
from kptrace.model.identity import Endpoint, Protocol, ServiceAddress, ServicePort
from kptrace.model.netfilter import DataPlane
from tests.cluster.client import Object
from tests.cluster.controlplane import ControlPlane
from tests.cluster.kubeproxy import KubeProxy, Mode
from tests.cluster.programs import wait_for

#: Above 1,000 endpoints kube-proxy writes fewer comments.
_LARGE = 340
#: No node of this name runs: kube-proxy has more rules for the back ends of its own.
_ELSEWHERE = "elsewhere"
_NFT_BLOCK = re.compile(r"\t(?:chain|set|map) (\S+) \{\n((?:\t\t.*\n)*)\t\}")
_ADDED = re.compile(r"-A (\S+) (.*)")

#: The rules of each chain, in their order, and the elements of each map or set: kube-proxy's order has no meaning there.
Rules = Mapping[str, list[str]]


def _nftables(namespace: Namespace) -> Rules:
    """Chains of Services, and the elements of the maps that lead there."""
    text = namespace.run(["nft", "list", "table", "ip", "kube-proxy"])
    found: dict[str, list[str]] = {}
    for name, body in _NFT_BLOCK.findall(text):
        if "/" in name:
            found[name] = body.split("\n")
        elif name in ("cluster-ips", "service-ips", "no-endpoint-services"):
            found[name] = sorted(re.split(r",\s+", body.partition("elements = {")[2].strip("\t\n }")))
    return found


def _iptables(namespace: Namespace, variant: str) -> Rules:
    """Chains of Services, in nat and filter."""
    found: dict[str, list[str]] = {}
    for table in ("nat", "filter"):
        for line in namespace.run([f"iptables-{variant}-save", "-t", table]).splitlines():
            match = _ADDED.match(line)
            if match and re.match("KUBE-(SERVICES|EXTERNAL-SERVICES|SVC|EXT|SEP)", match[1]):
                found.setdefault(f"{table} {match[1]}", []).append(match[2])
    for name, rules in found.items():
        if name.endswith("SERVICES"):
            rules.sort()
    # In a large cluster kube-proxy looks only every 30 s for endpoints' chains that nothing leads to any more.
    reached = {rule.rpartition(" ")[2] for rules in found.values() for rule in rules}
    return {
        name: rules for name, rules in found.items() if "KUBE-SEP" not in name or name.split()[1] in reached
    }


def _rules(namespace: Namespace, mode: Mode) -> Rules:
    if mode is Mode.NFTABLES:
        return _nftables(namespace)
    return _iptables(namespace, mode.removeprefix("iptables-"))


def _create(plane: ControlPlane, made: list[Object]) -> None:
    """Objects, and then the status of those that have one, which the creation does not touch."""
    for written, kept in zip(made, plane.client.create_all(made), strict=True):
        if "status" in written:
            plane.client.set_status(kept, written["status"])


def _specs(count: int, kube_namespace: str) -> list[ServiceSpec]:
    """Services of both kinds, one of each without endpoints; no back end is on kube-proxy's own node."""
    specs = [
        replace(spec, endpoints=tuple(sorted(end._replace(node=_ELSEWHERE) for end in spec.endpoints)))
        for spec in make_services(count, 3, namespace=kube_namespace, external_every=3)
    ]
    assert count % 3 == 1  # the last has an external address, the one before has none
    return [*specs[:-2], *(replace(spec, endpoints=()) for spec in specs[-2:])]


def _api_server(plane: ControlPlane) -> ServiceSpec:
    """The Service that the API server makes for itself."""
    port = ServicePort("default", "kubernetes", "https", Protocol.TCP)
    (found,) = plane.client.all_of("v1", "Service", "default")
    address = ServiceAddress(found["spec"]["clusterIP"], found["spec"]["ports"][0]["port"], Protocol.TCP)
    (ends,) = plane.client.all_of("discovery.k8s.io/v1", "EndpointSlice", "default")
    return ServiceSpec(
        port, address, (Endpoint(ends["endpoints"][0]["addresses"][0], ends["ports"][0]["port"]),)
    )


def _difference(ours: Namespace, real: Namespace, mode: Mode) -> str:
    """What either has and the other has not."""
    mine, theirs = _rules(ours, mode), _rules(real, mode)
    lines = [
        f"{name}: {set(mine.get(name, [])) ^ set(theirs.get(name, [])) or 'another order, or only one has it'}"
        for name in sorted(mine.keys() | theirs.keys())
        if mine.get(name) != theirs.get(name)
    ]
    return "\n".join(lines[:20])


@pytest.mark.parametrize(("mode", "count"), [*((mode, 22) for mode in Mode), (Mode.IPTABLES_LEGACY, _LARGE)])
def test_generated_rules_are_those_of_kube_proxy(
    mode: Mode,
    count: int,
    plane: ControlPlane,
    netns: Namespace,
    kube_namespace: str,
    start_kube_proxy: Callable[..., KubeProxy],
) -> None:
    """For the same Services, with external addresses and without, both install the same, and after a change too."""
    specs = _specs(count, kube_namespace)
    assert {spec.external is not None for spec in specs[-2:]} == {True, False}
    _create(plane, manifests.objects(specs))
    proxy = start_kube_proxy(mode)
    with Namespace("generated") as namespace:
        writer = RuleWriter(namespace, DataPlane(mode.value), counters=False)
        writer.install([*specs, _api_server(plane)])

        def same() -> bool:
            return _rules(namespace, mode) == _rules(netns, mode)

        wait_for(same, "the same rules", detail=lambda: _difference(namespace, netns, mode))
        begin = time.time()
        changed = replace(specs[0], endpoints=specs[0].endpoints[1:])
        plane.client.replace(manifests.objects([changed])[1])
        proxy.wait_synced(begin)
        writer.replace(0, changed)
        wait_for(same, "the same rules", detail=lambda: _difference(namespace, netns, mode))
        print(f"{mode}: {sum(map(len, _rules(netns, mode).values()))} rules and elements, all the same")
