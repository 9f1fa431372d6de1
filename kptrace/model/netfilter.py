# SPDX-License-Identifier: Apache-2.0
"""Netfilter's own words: hooks, families, base chains and the priorities where they really run."""

from dataclasses import dataclass
from enum import IntEnum, StrEnum


class Hook(IntEnum):
    """`enum nf_inet_hooks`, in the order in which a packet meets them."""

    PREROUTING = 0
    INPUT = 1
    FORWARD = 2
    OUTPUT = 3
    POSTROUTING = 4

    @property
    def label(self) -> str:
        """The hook as a label value: `prerouting`."""
        return self.name.lower()


class IpFamily(StrEnum):
    """An IP family, as Kubernetes and the metrics spell it."""

    IPV4 = "ipv4"
    IPV6 = "ipv6"

    @property
    def nfproto(self) -> int:
        """`NFPROTO_IPV4` (2) or `NFPROTO_IPV6` (10)."""
        return 2 if self is IpFamily.IPV4 else 10


class DataPlane(StrEnum):
    """Which implementation translates Service addresses, as a label value."""

    NFTABLES = "nftables"
    IPTABLES_NFT = "iptables-nft"
    IPTABLES_LEGACY = "iptables-legacy"
    CILIUM = "cilium"
    OTHER = "other"


class ChainType(StrEnum):
    """A base chain's type; NAT chains do not sit in their hook themselves (see `BaseChain.effective_priority`)."""

    FILTER = "filter"
    NAT = "nat"
    ROUTE = "route"


#: `NF_IP_PRI_NAT_DST` and `NF_IP_PRI_NAT_SRC`: where NAT's own hooks sit.
NAT_DST_PRIORITY = -100
NAT_SRC_PRIORITY = 100


@dataclass(frozen=True, slots=True, order=True)
class BaseChain:
    """One base chain of nf_tables, or one hook of a legacy table, in one IP family.

    A chain of the `inet` family is two of these. Chains of the arp, bridge and netdev families are none.

    Attributes:
        family: of the packets that walk it.
        hook: where it is attached.
        priority: as declared.
        dataplane: nftables, iptables-nft or iptables-legacy.
        table: the table's name.
        chain: the chain's name (legacy: `OUTPUT`).
        type: filter, nat or route.
    """

    family: IpFamily
    hook: Hook
    priority: int
    dataplane: DataPlane
    table: str
    chain: str
    type: ChainType

    @property
    def effective_priority(self) -> int:
        """Where the chain's rules really run.

        NAT's own hooks call the rules of NAT chains, whatever priority was declared: Linux kernel commit
        9971a514ed26 ("netfilter: nf_nat: add nat type hooks to nat core") (in v4.18).
        """
        if self.type is not ChainType.NAT:
            return self.priority
        return NAT_DST_PRIORITY if self.hook in (Hook.PREROUTING, Hook.OUTPUT) else NAT_SRC_PRIORITY
