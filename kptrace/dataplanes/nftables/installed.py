# SPDX-License-Identifier: Apache-2.0
"""What kube-proxy's own table has of Service ports. Pure."""

from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from types import MappingProxyType

from kptrace.dataplanes.nftables.service_names import bases
from kptrace.model.identity import ServicePort
from kptrace.model.netfilter import DataPlane, IpFamily

#: IP address and port number.
Address = tuple[str, int]


@dataclass(frozen=True, slots=True)
class InstalledNftables:
    """Read from kube-proxy's own table.

    Attributes:
        family: IPv4 or IPv6.
        endpoints: what the policy chains of a Service port choose from, by `namespace/name/protocol/port`.
        unread: Service ports that changed whenever they were read, by the same.
    """

    family: IpFamily
    endpoints: Mapping[str, Set[Address]] = field(default_factory=lambda: MappingProxyType({}))
    unread: Set[str] = frozenset()
    dataplane: DataPlane = DataPlane.NFTABLES

    def present(self, port: ServicePort) -> bool | None:
        """See `kptrace.dataplanes.installed_services.Installed`."""
        names = bases(port)
        return None if any(name in self.unread for name in names) else bool(self._chosen(port))

    def lacking(self, port: ServicePort, endpoints: Set[Address]) -> Set[Address]:
        """See `kptrace.dataplanes.installed_services.Installed`."""
        return endpoints - self._chosen(port)

    def besides(self, port: ServicePort, endpoints: Set[Address]) -> Set[Address]:
        """See `kptrace.dataplanes.installed_services.Installed`."""
        return self._chosen(port) - endpoints

    def _chosen(self, port: ServicePort) -> Set[Address]:
        return frozenset().union(*(self.endpoints.get(name, ()) for name in bases(port)))
