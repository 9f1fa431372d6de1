# SPDX-License-Identifier: Apache-2.0
"""Which Service ports one of kube-proxy's nftables batches writes, and what their rules hold then. Pure; never raises.

The rules of pkg/proxy/nftables in Kubernetes 1.36: a Service port that changed gets all its chains anew (add, flush, add
rule), and its addresses move between maps. Chains that are only flushed or deleted were given up before, and say
nothing: they are flushed in every sync until they are deleted. Only a full sync adds the table.
"""

from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from kptrace.dataplanes.nftables.service_names import KEY_MAPS, POLICY_CHAINS, bases, key_of, parse_chain
from kptrace.dataplanes.nftables.service_rules import Change, read_changes
from kptrace.dataplanes.service_index import Key, ServiceIndex
from kptrace.dataplanes.told import EVERYTHING, Touched, port_names
from kptrace.model.identity import Protocol, ServicePort
from kptrace.model.netfilter import IpFamily


@dataclass(frozen=True, slots=True)
class ServiceBatch:
    """What a batch says of kube-proxy's table in one IP family.

    Attributes:
        family: IPv4 or IPv6.
        truncated: the copy ends before the batch does, or a name is cut: what is not here may yet be in it.
        full: a full sync: a chain that is not here is in no use any more, unless it is truncated. Elements that are
            there already are not in it.
        chains: names of Service ports by `namespace/name/protocol/port`: kinds of their chains that were written.
        endpoints: by the same: what the Service port's policy chains choose from.
        bare: names in comments of addresses without endpoints, `namespace/name:port` and the protocol.
        keys: addresses and node ports: True where added, False where taken from the map of those that are answered,
            None where only taken from the map of those without endpoints (policy Local has some in both).
        whole: names of Service ports whose policy chains have all their rules here, whatever the copy lacks: kube-proxy
            adds all chains of a Service port before it writes the rules of one.
    """

    family: IpFamily
    truncated: bool = False
    full: bool = False
    chains: dict[str, AbstractSet[str]] = field(default_factory=dict)
    endpoints: dict[str, AbstractSet[tuple[str, int]]] = field(default_factory=dict)
    bare: AbstractSet[tuple[str, Protocol]] = frozenset()
    keys: dict[Key, bool | None] = field(default_factory=dict)
    whole: AbstractSet[str] = field(default=frozenset(), compare=False)

    def touches(self, port: ServicePort, *, bare: bool) -> bool | None:
        """See `Told`."""
        if self.truncated or self.full:
            return None
        return self._named(port)

    def endpoint(self, port: ServicePort, ip: str, number: int) -> bool | None:
        """See `Told`."""
        names = bases(port)
        if any((ip, number) in self.endpoints.get(name, ()) for name in names):
            return True
        if self.truncated:
            return False if any(name in self.whole for name in names) else None
        written = any(POLICY_CHAINS & self.chains.get(name, frozenset()) for name in names)
        return False if written or self.full or self._is_bare(port) else None

    def mentions(self, port: ServicePort, ip: str, number: int) -> bool:
        """See `Told`."""
        return any((ip, number) in self.endpoints.get(name, ()) for name in bases(port))

    def present(self, port: ServicePort) -> bool | None:
        """See `Told`."""
        return True if self._named(port) else None

    def address(self, port: ServicePort, ip: str, number: int) -> bool | None:
        """See `Told`."""
        key = ip, number, port.protocol
        if key not in self.keys:
            return None
        answered = self.keys[key]
        return self._named(port) if answered is None else answered

    def _named(self, port: ServicePort) -> bool:
        return any(name in self.chains for name in bases(port)) or self._is_bare(port)

    def _is_bare(self, port: ServicePort) -> bool:
        service = f"{port.namespace}/{port.name}"
        return any(
            (f"{service}:{name}" if name else service, port.protocol) in self.bare
            for name in port_names(port)
        )


def decode_services(data: bytes, size: int | None = None) -> tuple[ServiceBatch, ...]:
    """What the beginning of a batch says, one for each IP family whose `kube-proxy` table it names.

    Args:
        data: the copy.
        size: bytes of the whole batch, where it may be longer.
    """
    changes, cut = read_changes(data)
    truncated = cut or (size is not None and size > len(data))
    families = sorted({change.family for change in changes})
    return tuple(_reduce(family, changes, truncated=truncated) for family in families)


def touched_service_ports(batch: ServiceBatch, index: ServiceIndex) -> Touched:
    """The Service ports that a batch writes; everything, where the copy was cut or the sync was a full one."""
    if batch.truncated or batch.full:
        return EVERYTHING
    found = {index.at(key) for key in batch.keys}
    for base in batch.chains:
        namespace, service, protocol, port = base.split("/", 3)
        found.add(index.named(namespace, service, port, Protocol[protocol.upper()]))
    for text, number in batch.bare:
        namespace, _, rest = text.partition("/")
        service, _, port = rest.partition(":")
        found.add(index.named(namespace, service, port, number))
    return frozenset(port for port in found if port is not None)


def _reduce(family: IpFamily, changes: list[Change], *, truncated: bool) -> ServiceBatch:
    full = False
    chains: dict[str, set[str]] = {}
    endpoints: dict[str, set[tuple[str, int]]] = {}
    bare: set[tuple[str, Protocol]] = set()
    keys: dict[Key, bool | None] = {}
    without_rule: dict[str, set[str]] = {}
    for change in changes:
        if change.family is not family:
            continue
        if change.what == "table":
            full |= change.added
        elif change.what == "element" and change.name in KEY_MAPS:
            key = key_of(change.key, family, node_port=change.name.endswith("nodeports"))
            if key is not None:
                _note(keys, key, change)
                if change.added and change.comment:
                    bare.add((change.comment, key[2]))
            if change.added and (target := parse_chain(change.target)):
                chains.setdefault(target.base, set())
        elif (name := parse_chain(change.name)) and change.added:
            kinds = chains.setdefault(name.base, set())
            kinds.add(name.kind)
            if name.kind in POLICY_CHAINS:
                ends, clear = _back_ends(change)
                endpoints.setdefault(name.base, set()).update(ends)
                truncated |= not clear
                waiting = without_rule.setdefault(name.base, set())
                if change.what == "rule" and clear:
                    waiting.discard(name.kind)
                else:
                    waiting.add(name.kind)
    whole = {base for base, kinds in without_rule.items() if not kinds}
    return ServiceBatch(
        family, truncated, full, dict(chains), dict(endpoints), frozenset(bare), keys, frozenset(whole)
    )


def _note(keys: dict[Key, bool | None], key: Key, change: Change) -> None:
    """A key that moves from one map to another in a batch is added, in whatever order."""
    if change.added:
        keys[key] = True
    elif not change.name.startswith("no-endpoint"):
        keys[key] = keys.get(key) is True
    else:
        keys.setdefault(key, None)


def _back_ends(change: Change) -> tuple[set[tuple[str, int]], bool]:
    """What a policy chain's rule chooses from, addresses or by session affinity chains, and whether all of it is clear."""
    names = [parse_chain(target) for target in change.targets]
    through = {name.endpoint for name in names if name is not None and name.endpoint is not None}
    return through | set(change.addresses), len(through) == len(set(change.targets))
