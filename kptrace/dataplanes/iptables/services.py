# SPDX-License-Identifier: Apache-2.0
"""Which Service ports a batch of iptables-nft writes, by the hashes in kube-proxy's chain names. Pure; never raises.

The rules of pkg/proxy/iptables in Kubernetes 1.36: a Service port that changed gets its chains anew, and a chain for each
of its endpoints; one without endpoints has none, and where a node has many endpoints its old ones are not touched either:
then only KUBE-SERVICES, which every sync writes whole, could tell.
"""

from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Final, Protocol

from kptrace.dataplanes.service_index import ServiceIndex, iptables_hashes, iptables_names, name_hash
from kptrace.dataplanes.told import EVERYTHING, Touched
from kptrace.model.identity import ServicePort
from kptrace.model.netfilter import IpFamily

TABLE: Final = "nat"
SERVICES_CHAIN: Final = "KUBE-SERVICES"
_POLICY: Final = ("KUBE-SVC-", "KUBE-SVL-")
_SERVICE: Final = (*_POLICY, "KUBE-EXT-", "KUBE-FW-")
_ENDPOINT: Final = "KUBE-SEP-"
_HASH_LENGTH = 16


class ChainBatch(Protocol):
    """What is needed of a decoded batch (`dataplanes.nftables.batch.Batch`)."""

    @property
    def truncated(self) -> bool:
        """Whether the copy was too short."""
        ...

    @property
    def touched_chains(self) -> AbstractSet[tuple[str, str, str]]:
        """(family, table, chain)."""
        ...

    @property
    def deleted_chains(self) -> AbstractSet[tuple[str, str, str]]:
        """Those of them that are deleted."""
        ...


@dataclass(frozen=True, slots=True)
class ChainsTold:
    """What a batch says of the `nat` table in one IP family.

    Attributes:
        family: IPv4 or IPv6.
        truncated: the copy ends before the batch does: a chain that is written may be one that is emptied first and then
            deleted, which is how kube-proxy removes chains.
        written: kube-proxy's chains that were written and stay.
        deleted: those that were deleted.
        whole: whether KUBE-SERVICES was written.
    """

    family: IpFamily
    truncated: bool = False
    written: frozenset[str] = frozenset()
    deleted: frozenset[str] = frozenset()
    whole: bool = False

    def touches(self, port: ServicePort, *, bare: bool) -> bool | None:
        """See `Told`."""
        if self.truncated:
            return None
        if any(_service_chains(port, _SERVICE) & chains for chains in (self.written, self.deleted)):
            return True
        return None if bare and self.whole else False

    def endpoint(self, port: ServicePort, ip: str, number: int) -> bool | None:
        """See `Told`."""
        chains = endpoint_chains(port, ip, number)
        if self.truncated:
            return None
        if chains & self.written:
            return True
        gone = chains & self.deleted or _service_chains(port, _POLICY) & self.written
        return False if gone else None

    def mentions(self, port: ServicePort, ip: str, number: int) -> bool:
        """See `Told`."""
        return bool(endpoint_chains(port, ip, number) & self.written)

    def present(self, port: ServicePort) -> bool | None:
        """See `Told`."""
        return True if not self.truncated and _service_chains(port, _SERVICE) & self.written else None

    def address(self, port: ServicePort, ip: str, number: int) -> bool | None:
        """Not told: addresses are in rules, not in names."""
        return None


def chains_told(batch: ChainBatch) -> tuple[ChainsTold, ...]:
    """What a batch says, for each IP family whose `nat` table it touches a chain of kube-proxy's in."""
    told = []
    for family in IpFamily:
        here = {chain for where, table, chain in batch.touched_chains if (where, table) == (family, TABLE)}
        deleted = {chain for where, table, chain in batch.deleted_chains if (where, table) == (family, TABLE)}
        if not any(chain.startswith("KUBE-") for chain in here):
            continue
        told.append(
            ChainsTold(
                family,
                batch.truncated,
                frozenset(here - deleted),
                frozenset(deleted),
                SERVICES_CHAIN in here - deleted,
            )
        )
    return tuple(told)


def touched_service_ports(batch: ChainsTold, index: ServiceIndex) -> Touched:
    """The Service ports whose own chains a batch writes; everything, where the copy was cut."""
    if batch.truncated:
        return EVERYTHING
    found = {
        index.hashed(chain[-_HASH_LENGTH:])
        for chain in batch.written | batch.deleted
        if chain.startswith(_SERVICE)
    }
    return frozenset(port for port in found if port is not None)


def endpoint_chains(port: ServicePort, ip: str, number: int) -> frozenset[str]:
    """`KUBE-SEP-...`; two candidates where the port may have no name."""
    target = f"[{ip}]:{number}" if ":" in ip else f"{ip}:{number}"
    return frozenset(_ENDPOINT + name_hash(name + target, _HASH_LENGTH) for name in iptables_names(port))


def _service_chains(port: ServicePort, prefixes: tuple[str, ...]) -> frozenset[str]:
    return frozenset(prefix + text for text in iptables_hashes(port) for prefix in prefixes)


def service_chains(port: ServicePort) -> frozenset[str]:
    """The chains that choose a back end, `KUBE-SVC-...` and `KUBE-SVL-...`."""
    return _service_chains(port, _POLICY)


def own_chains(port: ServicePort) -> frozenset[str]:
    """All chains that may be a Service port's own, but those of its endpoints."""
    return _service_chains(port, _SERVICE)
