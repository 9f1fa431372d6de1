# SPDX-License-Identifier: Apache-2.0
"""Reading kube-proxy's rules back from nf_tables, one Service port at a time: short dumps, whatever the table's size."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Final

from kptrace.dataplanes.nftables.dump import DumpChannel, Interrupted, string
from kptrace.dataplanes.nftables.installed import Address, InstalledNftables
from kptrace.dataplanes.nftables.netlink import (
    ATTRIBUTES,
    NftMessage,
    attributes,
    text,
)
from kptrace.dataplanes.nftables.netlink_socket import DatagramSocket
from kptrace.dataplanes.nftables.service_names import POLICY_CHAINS, TABLE, parse_chain
from kptrace.dataplanes.nftables.service_rules import read_changes
from kptrace.model.netfilter import IpFamily

_TABLE_NAME: Final = 1
_CHAIN_NAME, _RULE_CHAIN, _RULE_EXPRESSIONS = 3, 2, 4
_SET_NAME, _LOOKUP_SET = 2, 1
_EXPRESSION_NAME, _EXPRESSION_DATA = 1, 2
_IMMEDIATE_DATA, _DATA_VERDICT, _VERDICT_CHAIN = 2, 2, 2
_ANONYMOUS: Final = "__"
#: Readings of one Service port's chains while kube-proxy replaces them.
TRIES: Final = 5


class ServiceDump:
    """Reads through a socket that nobody else uses, in the network namespace that it was made in."""

    def __init__(self, channel: DatagramSocket) -> None:
        """Nothing is asked yet."""
        self._channel = DumpChannel(channel)

    def chains(self, family: IpFamily) -> dict[str, set[str]]:
        """Names of all chains by table.

        Raises:
            NetlinkError: the kernel refused, or the ruleset never stayed the same for as long as it takes.
        """
        for attempt in range(TRIES):
            found: defaultdict[str, set[str]] = defaultdict(set)
            try:
                for message in self._dump(NftMessage.GETCHAIN, family, b""):
                    names = _texts(message, (_TABLE_NAME, _CHAIN_NAME))
                    found[names[_TABLE_NAME]].add(names[_CHAIN_NAME])
            except Interrupted:
                if attempt + 1 == TRIES:
                    raise
                continue
            return dict(found)
        return {}

    def read(self, family: IpFamily, chains: Iterable[str]) -> Iterator[InstalledNftables | None]:
        """Read the policy chains among kube-proxy's: None after each, then what was found.

        Raises:
            NetlinkError: the kernel refused.
        """
        endpoints: defaultdict[str, set[Address]] = defaultdict(set)
        unread: set[str] = set()
        for chain in sorted(chains):
            name = parse_chain(chain)
            if name is None or name.kind not in POLICY_CHAINS:
                continue
            found = self.back_ends(family, chain)
            if found is None:
                unread.add(name.base)
            else:
                endpoints[name.base] |= found
            yield None
        yield InstalledNftables(family, dict(endpoints), unread)

    def back_ends(self, family: IpFamily, chain: str) -> set[Address] | None:
        """What the rules of a policy chain choose from; None if they were replaced whenever they were read.

        A chain that is gone has none.
        """
        for _ in range(TRIES):
            try:
                return self._back_ends(family, chain)
            except Interrupted:
                continue
        return None

    def targets(self, family: IpFamily, table: str, chain: str) -> list[str]:
        """Where each rule of a chain jumps or goes to; empty for one that leads nowhere, or by a map.

        Raises:
            Interrupted: the ruleset changed, or the chain is gone.
        """
        names = string(_TABLE_NAME, table) + string(_RULE_CHAIN, chain)
        return [_target(rule) for rule in self._dump(NftMessage.GETRULE, family, names)]

    def _back_ends(self, family: IpFamily, chain: str) -> set[Address]:
        names = string(_TABLE_NAME, TABLE) + string(_RULE_CHAIN, chain)
        rules = list(self._dump(NftMessage.GETRULE, family, names))
        found: set[Address] = set()
        for rule in rules:
            for map_name in _anonymous_sets(rule):
                wanted = string(_TABLE_NAME, TABLE) + string(_SET_NAME, map_name)
                elements = b"".join(map(_padded, self._dump(NftMessage.GETSETELEM, family, wanted)))
                changes, _ = read_changes(elements + _padded(rule))
                for change in changes:
                    ends = (parse_chain(target) for target in change.targets)
                    found.update(end.endpoint for end in ends if end and end.endpoint)
                    found.update(change.addresses)
        return found

    def _dump(self, kind: NftMessage, family: IpFamily, wanted: bytes) -> list[bytes]:
        found: list[bytes] = []
        for _ in self._channel.dump(kind, family.nfproto, wanted, found.append):
            pass
        return found


def _anonymous_sets(rule: bytes) -> list[str]:
    """The anonymous sets and maps that a rule looks up."""
    found = []
    for expression, data in _expressions(rule):
        if expression == "lookup":
            name = text(rule, *data.get(_LOOKUP_SET, (0, 0)))
            found += [name] if name.startswith(_ANONYMOUS) else []
    return found


def _target(rule: bytes) -> str:
    """The chain in a rule's verdict; empty if it has none."""
    for expression, data in _expressions(rule):
        if expression == "immediate" and _IMMEDIATE_DATA in data:
            value = _ranges(rule, *data[_IMMEDIATE_DATA])
            verdict = _ranges(rule, *value.get(_DATA_VERDICT, (0, 0)))
            if _VERDICT_CHAIN in verdict:
                return text(rule, *verdict[_VERDICT_CHAIN])
    return ""


def _expressions(rule: bytes) -> Iterator[tuple[str, dict[int, tuple[int, int]]]]:
    """Each expression of a rule: its name, and its attributes."""
    wanted = _ranges(rule, ATTRIBUTES, len(rule)).get(_RULE_EXPRESSIONS, (0, 0))
    for _, start, end in attributes(rule, *wanted):
        parts = _ranges(rule, start, end)
        name = text(rule, *parts.get(_EXPRESSION_NAME, (0, 0)))
        yield name, _ranges(rule, *parts.get(_EXPRESSION_DATA, (0, 0)))


def _ranges(message: bytes, start: int, end: int) -> dict[int, tuple[int, int]]:
    return {kind: (low, high) for kind, low, high in attributes(message, start, end)}


def _texts(message: bytes, wanted: tuple[int, ...]) -> dict[int, str]:
    found = dict.fromkeys(wanted, "")
    for kind, low, high in attributes(message, ATTRIBUTES, len(message)):
        if kind in found:
            found[kind] = text(message, low, high)
    return found


def _padded(message: bytes) -> bytes:
    return message + bytes(-len(message) % 4)
