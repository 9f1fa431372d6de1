# SPDX-License-Identifier: Apache-2.0
"""Made-up Services with addresses from the embedded node's ranges: pure."""

import ipaddress
from dataclasses import dataclass, replace

from kptrace.model.identity import Endpoint, Protocol, ServiceAddress, ServicePort
from kptrace.model.netfilter import IpFamily

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

#: Where every back end listens, and a UDP port where nobody answers.
BACKEND_PORT = 8080
SINK_PORT = 9999
#: Leaves the addresses free that a cluster keeps for itself (`kubernetes`, `kube-dns`).
_FIRST_SERVICE = 257


@dataclass(frozen=True, slots=True)
class AddressPlan:
    """The address ranges of an embedded node in one family.

    Attributes:
        services: cluster IPs.
        external: addresses of load balancers: outside the cluster, and no interface has them.
        backends: addresses of back ends: any of them answers.
        clients: source addresses of clients; inside `cluster`, so kube-proxy's rules do not masquerade them.
        cluster: what kube-proxy gets as `--cluster-cidr`: back ends and clients, not the node.
        client_link, backend_link: the node's two veth pairs; the node has the first host address, the peer the second.
    """

    services: Network
    external: Network
    backends: Network
    clients: Network
    cluster: Network
    client_link: Network
    backend_link: Network


PLANS = {
    IpFamily.IPV4: AddressPlan(
        services=ipaddress.ip_network("10.96.0.0/16"),
        external=ipaddress.ip_network("10.97.0.0/16"),
        backends=ipaddress.ip_network("10.244.0.0/14"),
        clients=ipaddress.ip_network("10.240.0.0/16"),
        cluster=ipaddress.ip_network("10.240.0.0/12"),
        client_link=ipaddress.ip_network("10.99.0.0/24"),
        backend_link=ipaddress.ip_network("10.98.0.0/24"),
    ),
    IpFamily.IPV6: AddressPlan(
        services=ipaddress.ip_network("fd00:96::/112"),
        external=ipaddress.ip_network("fd00:97::/112"),
        backends=ipaddress.ip_network("fd00:244::/64"),
        clients=ipaddress.ip_network("fd00:240::/64"),
        cluster=ipaddress.ip_network("fd00:240::/29"),
        client_link=ipaddress.ip_network("fd00:99::/64"),
        backend_link=ipaddress.ip_network("fd00:98::/64"),
    ),
}


@dataclass(frozen=True, slots=True)
class ServiceSpec:
    """One Service port, where it is reached, and its back ends.

    Attributes:
        port: its names.
        address: its cluster IP.
        endpoints: its back ends.
        external: its load balancer's address, where it has one (policy Cluster, no node port).
    """

    port: ServicePort
    address: ServiceAddress
    endpoints: tuple[Endpoint, ...]
    external: ServiceAddress | None = None

    @property
    def addresses(self) -> tuple[ServiceAddress, ...]:
        """Wherever it is reached: the cluster IP, then the external address."""
        return (self.address,) if self.external is None else (self.address, self.external)

    @property
    def family(self) -> IpFamily:
        """The IP family of its address."""
        return IpFamily.IPV6 if ":" in self.address.ip else IpFamily.IPV4

    @property
    def full_name(self) -> str:
        """`namespace/name:port`, as kube-proxy spells a Service port."""
        return f"{self.port.namespace}/{self.port.name}:{self.port.port}"

    @property
    def protocol(self) -> str:
        """`tcp`, `udp` or `sctp`."""
        return self.port.protocol.name.lower()


def make_services(
    count: int,
    endpoints: int = 2,
    *,
    family: IpFamily = IpFamily.IPV4,
    protocol: Protocol = Protocol.TCP,
    first: int = 0,
    port: int = 80,
    target_port: int = BACKEND_PORT,
    namespace: str = "demo",
    external_every: int = 0,
) -> tuple[ServiceSpec, ...]:
    """`count` Services with `endpoints` back ends each, numbered from `first` on.

    The same numbers in two families are the same Services: same names, an address in each. Those whose number is a
    multiple of `external_every` have an external address too; none has where that is 0.

    Raises:
        ValueError: the ranges of the embedded node do not hold so many.
    """
    plan = PLANS[family]
    if (first + count) * endpoints + 1 >= plan.backends.num_addresses // 2:
        raise ValueError(f"{plan.backends} does not hold {count} x {endpoints} endpoints")
    for network in (plan.services, plan.external):
        if first + count + _FIRST_SERVICE >= network.num_addresses:
            raise ValueError(f"{network} does not hold {count} Services")
    name = "http" if protocol is Protocol.TCP else protocol.name.lower()
    return tuple(
        ServiceSpec(
            ServicePort(namespace, f"web-{number:05d}", name, protocol),
            ServiceAddress(str(plan.services[_FIRST_SERVICE + number]), port, protocol),
            tuple(
                Endpoint(
                    str(plan.backends[1 + number * endpoints + index]), target_port, node=f"node-{index}"
                )
                for index in range(endpoints)
            ),
            ServiceAddress(str(plan.external[_FIRST_SERVICE + number]), port, protocol)
            if external_every and number % external_every == 0
            else None,
        )
        for number in range(first, first + count)
    )


def change_endpoint(service: ServiceSpec, step: int) -> ServiceSpec:
    """The Service with its first endpoint replaced by one that no other step and no `make_services` uses.

    A Service without endpoints gets its first.
    """
    backends = PLANS[service.family].backends
    # From the range's upper half, which `make_services` leaves alone; the very last address is a broadcast one.
    index = backends.num_addresses // 2 + step % (min(backends.num_addresses, 1 << 32) // 2 - 1)
    old = service.endpoints[0] if service.endpoints else Endpoint("", BACKEND_PORT, node="node-0")
    return replace(service, endpoints=(old._replace(ip=str(backends[index])), *service.endpoints[1:]))
