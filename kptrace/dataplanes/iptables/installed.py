# SPDX-License-Identifier: Apache-2.0
"""What the names of the `nat` table's chains tell of Service ports. Pure."""

from collections.abc import Set
from dataclasses import dataclass

from kptrace.dataplanes.iptables.services import endpoint_chains, service_chains
from kptrace.model.identity import ServicePort
from kptrace.model.netfilter import DataPlane, IpFamily

#: IP address and port number.
Address = tuple[str, int]


@dataclass(frozen=True, slots=True)
class InstalledIptables:
    """Read from the names of the `nat` table's chains, which are hashes: what else there is they do not tell.

    Attributes:
        family: IPv4 or IPv6.
        chains: names of all chains.
        dataplane: iptables-nft or iptables-legacy.
    """

    family: IpFamily
    chains: Set[str]
    dataplane: DataPlane = DataPlane.IPTABLES_NFT

    def present(self, port: ServicePort) -> bool | None:
        """See `kptrace.dataplanes.installed_services.Installed`."""
        return bool(service_chains(port) & self.chains)

    def lacking(self, port: ServicePort, endpoints: Set[Address]) -> Set[Address]:
        """See `kptrace.dataplanes.installed_services.Installed`."""
        return {each for each in endpoints if not endpoint_chains(port, *each) & self.chains}

    def besides(self, port: ServicePort, endpoints: Set[Address]) -> Set[Address]:
        """None that could be known."""
        return frozenset()
