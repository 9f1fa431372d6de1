# SPDX-License-Identifier: Apache-2.0
"""What one write of a service or back end map tells of Service ports. Pure.

The maps' whole contents are known, so nothing is left open: of what the write changed the answer is yes or no, and what it
did not change it did not touch. A Service port has several frontends: its cluster IP, external and load-balancer addresses,
a node port at each address of the node, and the agent writes one after the other. Its endpoints are told by the cluster
IP's alone; that comes and goes with the Service port, and traffic inside the cluster goes through it. Its addresses are
told each by its own frontend, a node port by the first one that has it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from kptrace.dataplanes.cilium.service_effect import Effect, FrontendChange
from kptrace.dataplanes.cilium.service_map import ServiceFlag
from kptrace.dataplanes.service_index import Key, ServiceIndex
from kptrace.model.identity import Protocol, ServicePort

#: What a frontend has that is no cluster IP's. Local redirect policies lead to back ends that are not the Service's.
_NO_CLUSTER_IP: Final = (
    ServiceFlag.EXTERNAL_IP
    | ServiceFlag.NODEPORT
    | ServiceFlag.HOSTPORT
    | ServiceFlag.LOADBALANCER
    | ServiceFlag.LOCALREDIRECT
)


@dataclass(frozen=True, slots=True, eq=False)
class CiliumTold:
    """Implements `kptrace.dataplanes.told.Told`.

    Attributes:
        effect: what the write did.
        index: whose addresses they are; asked when a question comes, so Service ports count that were not known then.
    """

    effect: Effect
    index: ServiceIndex

    def touches(self, port: ServicePort, *, bare: bool) -> bool | None:
        """See `Told`. What it did to other frontends than the cluster IP is in `address`."""
        return any(True for _ in self._at_cluster_ip(port))

    def endpoint(self, port: ServicePort, ip: str, number: int) -> bool | None:
        """See `Told`."""
        answers = [(ip, number) in change.endpoints for change in self._at_cluster_ip(port)]
        return any(answers) if answers else None

    def mentions(self, port: ServicePort, ip: str, number: int) -> bool:
        """See `Told`."""
        return any((ip, number) in change.added | change.removed for change in self._at_cluster_ip(port))

    def present(self, port: ServicePort) -> bool | None:
        """See `Told`."""
        answers = [change.present for change in self._at_cluster_ip(port)]
        return any(answers) if answers else None

    def address(self, port: ServicePort, ip: str, number: int) -> bool | None:
        """See `Told`."""
        wanted = ip, number, port.protocol
        answers = [change.present for change in self.effect.changes if wanted in _keys(change)]
        return any(answers) if answers else None

    def ports(self) -> frozenset[ServicePort]:
        """The Service ports whose entries the write changed, by any of their frontends; only those known now."""
        found = (self.index.at(key) for change in self.effect.changes for key in _keys(change))
        return frozenset(port for port in found if port is not None)

    def _at_cluster_ip(self, port: ServicePort) -> Iterator[FrontendChange]:
        for change in self.effect.changes:
            if not change.flags & _NO_CLUSTER_IP and any(self.index.at(key) == port for key in _keys(change)):
                yield change


def _keys(change: FrontendChange) -> list[Key]:
    """What the frontend may be called in an index; a protocol that is not said may be any."""
    ip, port, protocol = change.frontend
    protocols = [each for each in Protocol if protocol in (0, each)]
    keys: list[Key] = [(ip, port, each) for each in protocols]
    if change.flags & ServiceFlag.NODEPORT:
        keys += [("", port, each) for each in protocols]
    return keys
