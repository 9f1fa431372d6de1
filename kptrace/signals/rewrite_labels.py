# SPDX-License-Identifier: Apache-2.0
"""Label values of rewrites: bounded, however many tables others make, whatever their names. Pure."""

from collections.abc import Collection, Iterable
from typing import Final

from kptrace.dataplanes.nftables.chains import dataplane_of
from kptrace.model.metrics import OTHER
from kptrace.model.netfilter import DataPlane, Hook

FAMILIES: Final = {1: "inet", 2: "ipv4", 3: "arp", 5: "netdev", 7: "bridge", 10: "ipv6"}
NFPROTOS: Final = {name: number for number, name in FAMILIES.items()}
SEVERAL: Final = "~several"
NONE: Final = "~none"
MAX_FOREIGN: Final = 32
NAME_BYTES: Final = 64

_KNOWN: Final = frozenset({"kube-proxy", "filter", "nat", "mangle", "raw", "security", NONE, SEVERAL, ""})


class TableNames:
    """Tables as label values: kube-proxy's and iptables' own, and the first `MAX_FOREIGN` others.

    A name that was told stays told.
    """

    def __init__(self) -> None:
        self._told: set[str] = set()

    def label(self, name: str) -> str:
        """The label value of a table's name; `~other` beyond the bound."""
        if name in _KNOWN:
            return name or NONE
        short = name.encode(errors="backslashreplace")[:NAME_BYTES].decode(errors="ignore")
        if short not in self._told:
            if len(self._told) >= MAX_FOREIGN:
                return OTHER
            self._told.add(short)
        return short


def dataplane(nfproto: int, table: str, base: Collection[str]) -> DataPlane:
    """Whose table it is, by the rule of `dataplanes.nftables.chains`, for a table with these base chains.

    A table called like one of iptables' is iptables-nft's too where it has no base chain, or none is known: iptables
    makes them when they are first used.
    """
    hooks = [hook for hook in Hook if hook.name in base] if base else Hook
    if any(dataplane_of(nfproto, table, hook.name, hook) is DataPlane.IPTABLES_NFT for hook in hooks):
        return DataPlane.IPTABLES_NFT
    return DataPlane.NFTABLES


def family_and_table(tables: Iterable[tuple[str, str]]) -> tuple[str, str]:
    """One (family, table) for a batch: `~several` where it touches more, `~none` where it touches nothing known."""
    every = sorted(set(tables))
    if not every:
        return NONE, NONE
    families, names = {family for family, _ in every}, {name for _, name in every}
    return (
        every[0][0] if len(families) == 1 else SEVERAL,
        (every[0][1] or NONE) if len(names) == 1 else SEVERAL,
    )
