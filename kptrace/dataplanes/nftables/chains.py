# SPDX-License-Identifier: Apache-2.0
"""Base chains from a GETCHAIN dump. Pure, and fast where nearly all chains are no base chains."""

import struct
from collections.abc import Collection, Iterable
from typing import Final

from kptrace.dataplanes.nftables.netlink import ATTRIBUTES, HEADER, attributes, be32, text
from kptrace.model.netfilter import BaseChain, ChainType, DataPlane, Hook, IpFamily

NFPROTO_INET, NFPROTO_IPV4, NFPROTO_IPV6 = 1, 2, 10

#: Which packets the base chains of a family see. Chains of arp (3), netdev (5) and bridge (7) see no IP hooks.
_FAMILIES: Final = {
    NFPROTO_INET: (IpFamily.IPV4, IpFamily.IPV6),
    NFPROTO_IPV4: (IpFamily.IPV4,),
    NFPROTO_IPV6: (IpFamily.IPV6,),
}
_TYPES: Final = {kind.value: kind for kind in ChainType}

_TABLE_NAME, _TABLE_FLAGS = 1, 2
_DORMANT = 1
_CHAIN_TABLE, _CHAIN_NAME, _CHAIN_HOOK, _CHAIN_TYPE = 1, 3, 4, 7
_HOOK_NUMBER, _HOOK_PRIORITY = 1, 2
# NFTA_CHAIN_HOOK's type followed by the header of the NFTA_HOOK_HOOKNUM in it, with and without the flag for nested
# attributes: a search for these bytes is five times as fast as a walk through the attributes. Found by chance in
# another attribute, they only cost that walk.
_HOOK_BYTES: Final = tuple(
    struct.pack("=HHH", kind, 8, _HOOK_NUMBER) for kind in (_CHAIN_HOOK, 0x8000 | _CHAIN_HOOK)
)

_IPTABLES_TABLES: Final = frozenset({"filter", "nat", "mangle", "raw", "security"})
_IPTABLES_CHAINS: Final = {hook.name: hook for hook in Hook}


def dataplane_of(family: int, table: str, chain: str, hook: Hook) -> DataPlane:
    """Which program's rules a base chain of nf_tables holds, by its names.

    iptables-nft knows five tables, in the families ip and ip6, whose base chains are called like their hook in capital
    letters: such a chain is iptables-nft's, also where somebody made it with nft, since iptables would use it as its
    own. Every other chain (kube-proxy's table, firewalld's, a user's) is nftables'.
    """
    builtin = (
        family in (NFPROTO_IPV4, NFPROTO_IPV6)
        and table in _IPTABLES_TABLES
        and _IPTABLES_CHAINS.get(chain) is hook
    )
    return DataPlane.IPTABLES_NFT if builtin else DataPlane.NFTABLES


def dormant_tables(messages: Iterable[bytes]) -> frozenset[tuple[int, str]]:
    """The tables of a GETTABLE dump, as (nfproto, name), whose base chains are not in their hooks at present."""
    dormant = set()
    for message in messages:
        name, flags = "", 0
        for kind, start, end in attributes(message, ATTRIBUTES, len(message)):
            if kind == _TABLE_NAME:
                name = text(message, start, end)
            elif kind == _TABLE_FLAGS:
                flags = be32(message, start, end)
        if flags & _DORMANT:
            dormant.add((message[HEADER.size], name))
    return frozenset(dormant)


def base_chains(
    messages: Iterable[bytes], dormant: Collection[tuple[int, str]] = frozenset()
) -> tuple[BaseChain, ...]:
    """The base chains of the IP families from a GETCHAIN dump of all families (AF_UNSPEC), sorted.

    A chain of the inet family is two, one for IPv4 and one for IPv6. Left out are chains of the arp, bridge and netdev
    families, chains at other than the five IP hooks (inet ingress), and chains of `dormant` tables.
    """
    plain, nested = _HOOK_BYTES
    found: list[BaseChain] = []
    for message in messages:
        if plain in message or nested in message:
            found.extend(_decode(message, dormant))
    return tuple(sorted(found))


def any_nat(chains: Iterable[BaseChain], family: IpFamily) -> bool:
    """Whether NAT's own hooks exist in a family: at all four hooks as soon as one NAT chain is registered."""
    return any(chain.type is ChainType.NAT and chain.family is family for chain in chains)


def _decode(message: bytes, dormant: Collection[tuple[int, str]]) -> Iterable[BaseChain]:
    table = chain = kind_name = ""
    number = priority = None
    for kind, start, end in attributes(message, ATTRIBUTES, len(message)):
        if kind == _CHAIN_TABLE:
            table = text(message, start, end)
        elif kind == _CHAIN_NAME:
            chain = text(message, start, end)
        elif kind == _CHAIN_TYPE:
            kind_name = text(message, start, end)
        elif kind == _CHAIN_HOOK:
            for inner, low, high in attributes(message, start, end):
                if inner == _HOOK_NUMBER:
                    number = be32(message, low, high)
                elif inner == _HOOK_PRIORITY:
                    priority = int.from_bytes(message[low : low + 4], "big", signed=True)
    family = message[HEADER.size]
    if number is None or priority is None or number > max(Hook) or (family, table) in dormant:
        return
    hook = Hook(number)
    for ip_family in _FAMILIES.get(family, ()):
        yield BaseChain(
            family=ip_family,
            hook=hook,
            priority=priority,
            dataplane=dataplane_of(family, table, chain, hook),
            table=table,
            chain=chain,
            type=_TYPES.get(kind_name, ChainType.FILTER),
        )
