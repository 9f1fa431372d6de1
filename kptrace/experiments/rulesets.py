# SPDX-License-Identifier: Apache-2.0
"""kube-proxy-shaped rule sets in each of its modes, as the tools' input: pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from kptrace.experiments import rules_iptables, rules_nftables
from kptrace.experiments.services import ServiceSpec
from kptrace.model.netfilter import DataPlane, Hook, IpFamily

#: The data planes that there are rule sets for.
DATA_PLANES = (DataPlane.NFTABLES, DataPlane.IPTABLES_LEGACY, DataPlane.IPTABLES_NFT)


@dataclass(frozen=True, slots=True)
class Sync:
    """One run of the tool that writes rules.

    Attributes:
        argv: the tool and its arguments.
        text: its standard input.
        commits: how many kernel transactions it makes.
    """

    argv: tuple[str, ...]
    text: str
    commits: int


def nat_chain(dataplane: DataPlane, hook: Hook) -> tuple[str, str]:
    """Table and name of the base chain that translates Service addresses at PREROUTING or OUTPUT."""
    if dataplane is DataPlane.NFTABLES:
        return rules_nftables.TABLE, f"nat-{hook.label}"
    return "nat", hook.name


def _restore(dataplane: DataPlane, family: IpFamily, text: str, *, flush: bool = False) -> Sync:
    tool = "iptables" if family is IpFamily.IPV4 else "ip6tables"
    variant = "legacy" if dataplane is DataPlane.IPTABLES_LEGACY else "nft"
    argv = (f"{tool}-{variant}-restore", "-w", "5", *(() if flush else ("--noflush", "--counters")))
    return Sync(argv, text, text.count("\nCOMMIT"))


def _nft(text: str) -> Sync:
    return Sync(("nft", "-f", "-"), text, 1)


def install(
    dataplane: DataPlane, family: IpFamily, services: Sequence[ServiceSpec], *, counters: bool = True
) -> tuple[Sync, ...]:
    """What kube-proxy does at its start on a node without rules.

    Args:
        dataplane: one of `DATA_PLANES`.
        family: the Services' family.
        services: what to install.
        counters: let nftables count what walks the NAT chains (iptables always does; kube-proxy's rules do not).
    """
    if dataplane is DataPlane.NFTABLES:
        return (_nft(rules_nftables.full(family, services, counters=counters)),)
    return (
        _restore(dataplane, family, rules_iptables.jumps()),
        _restore(dataplane, family, rules_iptables.full(family, services)),
    )


def change(
    dataplane: DataPlane, services: Sequence[ServiceSpec], before: ServiceSpec, after: ServiceSpec
) -> Sync:
    """The partial sync of one Service whose endpoints changed; `services` are all of its family, afterwards."""
    if dataplane is DataPlane.NFTABLES:
        return _nft(rules_nftables.change(before, after))
    return _restore(dataplane, after.family, rules_iptables.change(services, before, after))


def remove(dataplane: DataPlane, family: IpFamily) -> Sync:
    """What takes everything away again."""
    if dataplane is DataPlane.NFTABLES:
        return _nft(rules_nftables.remove(family))
    return _restore(dataplane, family, rules_iptables.remove(), flush=True)
