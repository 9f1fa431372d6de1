# SPDX-License-Identifier: Apache-2.0
"""Which endpoints of a Service port kube-proxy programs on one node. Pure.

The rules of `CategorizeEndpoints` in pkg/proxy/topology.go, Kubernetes 1.36 (node hints count since 1.34). Endpoints for
the policies Cluster and Local are chosen apart, and what is programmed is both together.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kptrace.identity.packing import ByPort
from kptrace.identity.records import LocalPolicy, PortRecord, ServiceRecord, SliceRecord
from kptrace.model.identity import Endpoint, ServicePort
from kptrace.model.netfilter import IpFamily

#: An address, or empty for a node port, and a port number.
Address = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Place:
    """Where kube-proxy runs.

    Attributes:
        node: the node's name, as EndpointSlices spell it; empty where unknown: no endpoint is local then.
        zone: its topology zone; empty where it has none.
    """

    node: str = ""
    zone: str = ""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What one Service port is to have in the kernel, in one IP family.

    Attributes:
        addresses: where it is reached: cluster, external and load-balancer IPs with its port; a node port without IP.
        endpoints: its back ends for this node.
    """

    addresses: frozenset[Address]
    endpoints: frozenset[Address]


def wanted(
    service: ServiceRecord | None, slices: Iterable[SliceRecord], place: Place
) -> dict[tuple[ServicePort, IpFamily], Wanted]:
    """What a Service is to have on this node; nothing for one that kube-proxy does not serve.

    Headless and ExternalName Services, and those that are another proxy's, have no ports (`identity.objects`).
    """
    if service is None:
        return {}
    found = {}
    every = [record.endpoints for record in slices]  # each look unpacks them
    for family in IpFamily:
        addresses = [ip for ip in service.addresses if _family(ip) is family]
        # Without a cluster IP in a family, nothing of it is served in that family.
        if not any(_family(ip) is family for ip in service.addresses[: service.cluster_ips]):
            continue
        for port in service.ports:
            is_ipv6 = family is IpFamily.IPV6
            ends = [end for end in _endpoints(port, every) if (":" in end.ip) is is_ipv6]
            chosen = eligible(ends, service.local, place, outside=len(addresses) > 1 or port.node_port != 0)
            places = {(ip, port.number) for ip in addresses} | (
                {("", port.node_port)} if port.node_port else set()
            )
            back_ends = frozenset((end.ip, end.port) for end in chosen)
            found[port.service_port, family] = Wanted(frozenset(places), back_ends)
    return found


def eligible(
    endpoints: Sequence[Endpoint], local: LocalPolicy, place: Place, *, outside: bool
) -> tuple[Endpoint, ...]:
    """The endpoints that are programmed on a node, of one Service port and family.

    Args:
        endpoints: all that there are, each address once.
        local: the Service's traffic policies.
        place: the node.
        outside: whether the Service port is reached by more than its cluster IP: a node port, an external or a
            load-balancer IP. Policy Local for those needs the Cluster endpoints too: the node's own traffic takes them.
    """
    chosen: tuple[Endpoint, ...] = ()
    if outside or not local & LocalPolicy.INTERNAL:
        hinted = _hinted([end for end in endpoints if end.ready], place)
        chosen = tuple(hinted or _leaving(endpoints))
    if local & LocalPolicy.INTERNAL or (outside and local & LocalPolicy.EXTERNAL):
        here = [end for end in endpoints if place.node and end.node == place.node]
        on_node = [end for end in here if end.ready] or _leaving(here)
        chosen += tuple(end for end in on_node if end not in chosen)
    return chosen


def _hinted(ready: Sequence[Endpoint], place: Place) -> Sequence[Endpoint]:
    """Those meant for the node, else for its zone, where every endpoint has hints and one is for here; else all."""
    if all(end.hints.nodes for end in ready):
        for_node = [end for end in ready if place.node in end.hints.nodes]
        if for_node:
            return for_node
    if all(end.hints.zones for end in ready):
        for_zone = [end for end in ready if place.zone in end.hints.zones]
        if for_zone:
            return for_zone
    return ready


def _leaving(endpoints: Sequence[Endpoint]) -> list[Endpoint]:
    """Endpoints that end and still answer: they serve where none is ready."""
    return [end for end in endpoints if end.serving and end.terminating]


def _endpoints(port: PortRecord, slices: Iterable[ByPort]) -> Iterable[Endpoint]:
    """Each address once: of two pods with one address (the old one's slice is late) the one that stays counts."""
    key = port.name, port.service_port.protocol
    best: dict[Address, Endpoint] = {}
    for by_port in slices:
        for name, ends in by_port:
            for end in ends if name == key else ():
                known = best.get((end.ip, end.port))
                if known is None or _rank(end) > _rank(known):
                    best[end.ip, end.port] = end
    return best.values()


def _rank(endpoint: Endpoint) -> tuple[bool, bool, bool, Endpoint]:
    return not endpoint.terminating, endpoint.ready, endpoint.serving, endpoint


def _family(ip: str) -> IpFamily:
    return IpFamily.IPV6 if ":" in ip else IpFamily.IPV4
