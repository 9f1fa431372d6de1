# SPDX-License-Identifier: Apache-2.0
"""What kube-proxy's rules in the kernel have of Service ports, whatever its mode."""

from collections.abc import Iterator, Set
from typing import Protocol

from kptrace.dataplanes.iptables.installed import InstalledIptables
from kptrace.dataplanes.iptables.services import SERVICES_CHAIN
from kptrace.dataplanes.iptables.services import TABLE as NAT
from kptrace.dataplanes.nftables.service_dump import ServiceDump
from kptrace.dataplanes.nftables.service_names import TABLE as KUBE_PROXY
from kptrace.model.identity import ServicePort
from kptrace.model.netfilter import DataPlane, IpFamily

#: IP address and port number.
Address = tuple[str, int]


class Installed(Protocol):
    """One reading of the rules of one IP family."""

    @property
    def dataplane(self) -> DataPlane:
        """Whose rules."""
        ...

    @property
    def family(self) -> IpFamily:
        """Of the rules."""
        ...

    def present(self, port: ServicePort) -> bool | None:
        """Whether there are rules that choose a back end for a Service port; None where that could not be read."""
        ...

    def lacking(self, port: ServicePort, endpoints: Set[Address]) -> Set[Address]:
        """Those of the endpoints that the rules of a present Service port lack."""
        ...

    def besides(self, port: ServicePort, endpoints: Set[Address]) -> Set[Address]:
        """Endpoints that the rules have besides these, as far as the data plane's names tell."""
        ...


def read_installed(dump: ServiceDump, family: IpFamily) -> Iterator[Installed | None]:
    """Read all of kube-proxy's rules of a family: None after each step, then what was found, if nf_tables has any.

    Raises:
        NetlinkError: the kernel refused.
    """
    tables = dump.chains(family)
    if KUBE_PROXY in tables:
        yield from dump.read(family, tables[KUBE_PROXY])
    elif SERVICES_CHAIN in tables.get(NAT, ()):
        yield InstalledIptables(family, frozenset(tables[NAT]))
