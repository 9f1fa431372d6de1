# SPDX-License-Identifier: Apache-2.0
"""What a first packet to a Service walks: the chains, how many rules each has, and where among them the Service's is."""

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Final

from kptrace.dataplanes.iptables.services import SERVICES_CHAIN, own_chains
from kptrace.dataplanes.iptables.services import TABLE as NAT
from kptrace.dataplanes.nftables.dump import Interrupted
from kptrace.dataplanes.nftables.service_dump import ServiceDump
from kptrace.dataplanes.nftables.service_names import TABLE as KUBE_PROXY
from kptrace.dataplanes.nftables.service_names import bases, parse_chain
from kptrace.model.identity import ServicePort
from kptrace.model.netfilter import DataPlane, IpFamily

#: Chains that a packet passes on its way to any Service, in order, where they are.
_NFT_WAY: Final[tuple[str, ...]] = ("nat-prerouting", "services")
_IPTABLES_WAY: Final[tuple[str, ...]] = ("PREROUTING", SERVICES_CHAIN)


@dataclass(frozen=True, slots=True)
class Step:
    """One chain on the way.

    Attributes:
        family, table, chain: which.
        rules: it has; -1 where they changed whenever they were counted.
        position: of the rule that leads on to the Service, from 1; 0 where a map or chance chooses, not the rule's turn;
            None where no rule was found that does, or the chain changed whenever it was read.
    """

    family: IpFamily
    table: str
    chain: str
    rules: int
    position: int | None = 0


@dataclass(frozen=True, slots=True)
class Walk:
    """The way to one Service port in one IP family; nothing in it where nf_tables has no rules of kube-proxy's."""

    dataplane: DataPlane
    steps: tuple[Step, ...] = ()


def find_walk(dump: ServiceDump, family: IpFamily, port: ServicePort) -> Walk | None:
    """The way of a first packet from the first base chain to the choice of a back end; None without kube-proxy's rules.

    Raises:
        NetlinkError: the kernel refused, or the ruleset never stayed the same.
    """
    tables = dump.chains(family)
    if KUBE_PROXY in tables:
        names = set(bases(port))
        own = sorted(
            chain
            for chain in tables[KUBE_PROXY]
            if (found := parse_chain(chain)) is not None and found.base in names
        )
        way = [chain for chain in _NFT_WAY if chain in tables[KUBE_PROXY]] if own else []
        return Walk(DataPlane.NFTABLES, tuple(_steps(dump, family, KUBE_PROXY, [*way, *own], {})))
    if SERVICES_CHAIN in tables.get(NAT, ()):
        chains = tables[NAT]
        mine = own_chains(port) & chains
        way = [chain for chain in _IPTABLES_WAY if chain in chains] if mine else []
        turns = _turns(dump, family, way, mine)
        return Walk(DataPlane.IPTABLES_NFT, tuple(_steps(dump, family, NAT, [*way, *sorted(mine)], turns)))
    return None


def _turns(
    dump: ServiceDump, family: IpFamily, way: Sequence[str], mine: Set[str]
) -> Mapping[str, int | None]:
    """The position, in each chain on the way, of the first rule that leads on."""
    found: dict[str, int | None] = dict.fromkeys(way)
    for chain, following in zip(way, [*({each} for each in way[1:]), mine], strict=bool(way)):
        try:
            targets = dump.targets(family, NAT, chain)
        except Interrupted:
            continue
        found[chain] = next((n for n, target in enumerate(targets, 1) if target in following), None)
    return found


def _steps(
    dump: ServiceDump, family: IpFamily, table: str, chains: Iterable[str], turns: Mapping[str, int | None]
) -> Iterable[Step]:
    for chain in chains:
        try:
            rules = len(dump.targets(family, table, chain))
        except Interrupted:
            rules = -1
        yield Step(family, table, chain, rules, turns.get(chain, 0))
