# SPDX-License-Identifier: Apache-2.0
"""What brackets are called: bounded label values, however many chains others install, whatever their names. Pure."""

from collections.abc import Iterable, Sequence
from typing import Final

from kptrace.model.metrics import OTHER
from kptrace.model.netfilter import BaseChain, DataPlane
from kptrace.signals.lookup_brackets import Name

SHARED: Final = "~shared"
NAME_BYTES: Final = 64
#: Names of one bracket's members that are told apart; a bracket of more chains has them under `~other`.
MAX_MEMBERS: Final = 32

KUBE_PROXY_TABLE: Final = "kube-proxy"
_FOLDED: Final[Name] = (OTHER, OTHER)


def is_known(chain: BaseChain) -> bool:
    """Whether its name is one that the number of names need not be bounded for: kube-proxy's and iptables' own."""
    return (
        chain.dataplane in (DataPlane.IPTABLES_NFT, DataPlane.IPTABLES_LEGACY)
        or chain.table == KUBE_PROXY_TABLE
    )


def cut(name: str) -> str:
    """The name's first `NAME_BYTES` bytes of UTF-8, no character halved."""
    return name.encode(errors="backslashreplace")[:NAME_BYTES].decode(errors="ignore")


def dataplane_of(chains: Sequence[BaseChain]) -> DataPlane:
    """The data plane of all of them, `other` where they differ."""
    planes = {chain.dataplane for chain in chains}
    return planes.pop() if len(planes) == 1 else DataPlane.OTHER


class Names:
    """Label values for the brackets of one plan: at most `limit` names that are neither kube-proxy's nor iptables'.

    A name that was in use stays, whatever comes: a label must not change because of somebody else's chain.
    """

    def __init__(self, brackets: Iterable[Sequence[BaseChain]], in_use: Iterable[Name], limit: int) -> None:
        """Choose the names that are told apart, for brackets given by their chains."""
        every = tuple(brackets)
        labels = {_label(chains) for chains in every if not any(map(is_known, chains))}
        members = {_name(chain) for chains in every for chain in chains if not is_known(chain)}
        used = set(in_use)
        # Labels before mere members, used before new, then by name.
        order = sorted(labels | members, key=lambda name: (name not in labels, name not in used, name))
        self._told = frozenset(order[:limit])

    def label(self, chains: Sequence[BaseChain]) -> Name:
        """Table and chain label of the bracket around these chains, which come in the order of their priorities."""
        name = _label(chains)
        return name if any(map(is_known, chains)) or name in self._told else _FOLDED

    def members(self, chains: Sequence[BaseChain]) -> tuple[Name, ...]:
        """The (table, chain) pairs for `kptrace_bracket_info`, each once."""
        names = sorted({_name(c) if is_known(c) or _name(c) in self._told else _FOLDED for c in chains})
        return tuple(names) if len(names) <= MAX_MEMBERS else (*names[: MAX_MEMBERS - 1], _FOLDED)


def _name(chain: BaseChain) -> Name:
    return cut(chain.table), cut(chain.chain)


def _label(chains: Sequence[BaseChain]) -> Name:
    return _name(chains[0]) if len(chains) == 1 else (SHARED, f"priority{chains[0].effective_priority}")
