# SPDX-License-Identifier: Apache-2.0
"""In which order an agent of Cilium's writes a Service into its maps: every write, one after the other. Pure.

After pkg/service (up to 1.17) and pkg/loadbalancer/reconciler (since) of cilium/cilium. In both a Service's own entry,
slot 0, is the write that makes the new back ends live.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from kptrace.experiments import cilium_entries as entries
from kptrace.experiments.cilium_layouts import Control, MapName
from kptrace.model.identity import Endpoint, ServiceAddress
from kptrace.model.netfilter import IpFamily


class Phase(IntEnum):
    """What a write is for, in an order in which it may happen if many Services are written together."""

    ORPHAN = 0
    BACKEND = 1
    SLOT = 2
    AFFINITY = 3
    REVERSE = 4
    MASTER = 5
    SURPLUS = 6
    UNUSED = 7


@dataclass(frozen=True, slots=True)
class Write:
    """One update, or one deletion where there is no value, of one entry."""

    phase: Phase
    map: MapName
    key: bytes
    value: bytes | None = None


@dataclass(slots=True)
class _Backend:
    id: int
    state: int
    users: set[ServiceAddress] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class _Frontend:
    id: int
    backends: tuple[tuple[str, int, int], ...]  # address, port, protocol, by slot


_MAPS = {
    IpFamily.IPV4: (MapName.SERVICES4, MapName.BACKENDS4, MapName.REVERSE_NAT4),
    IpFamily.IPV6: (MapName.SERVICES6, MapName.BACKENDS6, MapName.REVERSE_NAT6),
}


def _family(ip: str) -> IpFamily:
    return IpFamily.IPV6 if ":" in ip else IpFamily.IPV4


def _state(endpoint: Endpoint) -> int | None:
    """A back end's state; None for one that nothing is sent to."""
    if endpoint.terminating:
        return entries.TERMINATING if endpoint.serving else None
    return entries.ACTIVE if endpoint.ready else None


class ServiceTable:
    """What the agent has in its maps, and the writes that change it. Its state follows the writes that it hands out."""

    def __init__(self, control: Control, value_sizes: dict[MapName, int]) -> None:
        """Empty maps.

        Args:
            control: the agent's ways.
            value_sizes: of the maps of back ends.
        """
        self._control = control
        self._sizes = value_sizes
        self._frontends: dict[ServiceAddress, _Frontend] = {}
        self._backends: dict[tuple[str, int, int], _Backend] = {}
        self._last_service = 0
        self._last_backend = 0

    @property
    def addresses(self) -> tuple[ServiceAddress, ...]:
        """All that are in the maps."""
        return tuple(self._frontends)

    def update(
        self, address: ServiceAddress, endpoints: Sequence[Endpoint], *, flags: int = 0
    ) -> list[Write]:
        """Give an address these back ends, whether it is there already or not."""
        services, _, reverse = _MAPS[_family(address.ip)]
        protocol = address.protocol if self._control.protocol_in_keys else 0
        wanted = {(e.ip, e.port, protocol): s for e in endpoints if (s := _state(e)) is not None}
        ordered = sorted(wanted, key=lambda each: (wanted[each], each))
        before = self._frontends.get(address)
        if before is None:
            self._last_service += 1
            before = _Frontend(self._last_service, ())
        writes: list[Write] = []
        gone = [each for each in before.backends if each not in wanted]
        removals = [write for each in gone for write in self._release(each, address, before.id)]
        if self._control.orphans_first:
            writes += removals
        slots: list[Write] = []
        for slot, each in enumerate(ordered, 1):
            added = self._use(each, wanted[each], address)
            backend = self._backends[each].id
            written = Write(
                Phase.SLOT,
                services,
                self._key(address, slot),
                entries.service_value(before.id, backend=backend),
            )
            if self._control.orphans_first:
                # Session affinity is off, and its entry deleted all the same: the failure is the usual case.
                affinity = entries.affinity_match_key(backend, before.id)
                writes += [*added, written, Write(Phase.AFFINITY, MapName.AFFINITY_MATCH, affinity)]
            else:
                writes += added
                slots.append(written)
        writes += slots
        writes.append(
            Write(Phase.REVERSE, reverse, entries.reverse_key(before.id), entries.reverse_value(address))
        )
        active = sum(state == entries.ACTIVE for state in wanted.values())
        count = active or len(ordered)
        inactive = len(ordered) - count if self._control.protocol_in_keys else 0
        master = entries.service_value(before.id, count=count, inactive=inactive, flags=flags)
        writes.append(Write(Phase.MASTER, services, self._key(address, 0), master))
        writes += [
            Write(Phase.SURPLUS, services, self._key(address, slot))
            for slot in range(len(ordered) + 1, len(before.backends) + 1)
        ]
        if not self._control.orphans_first:
            writes += removals
        self._frontends[address] = _Frontend(before.id, tuple(ordered))
        return writes

    def remove(self, address: ServiceAddress) -> list[Write]:
        """Take an address away: its own entry first, then its slots."""
        services, _, reverse = _MAPS[_family(address.ip)]
        before = self._frontends.pop(address)
        orphans = [w for each in before.backends for w in self._release(each, address, before.id)]
        writes = [Write(Phase.MASTER, services, self._key(address, 0))]
        writes += [
            Write(Phase.SURPLUS, services, self._key(address, slot))
            for slot in range(1, len(before.backends) + 1)
        ]
        writes.append(Write(Phase.UNUSED, reverse, entries.reverse_key(before.id)))
        return [*orphans, *writes] if self._control.orphans_first else [*writes, *orphans]

    def _key(self, address: ServiceAddress, slot: int) -> bytes:
        return entries.service_key(address, slot, protocol=self._control.protocol_in_keys)

    def _use(self, each: tuple[str, int, int], state: int, address: ServiceAddress) -> list[Write]:
        """The address uses the back end, which is written if it is new or its state is."""
        backend = self._backends.get(each)
        if backend is not None and backend.state == state:
            backend.users.add(address)
            return []
        if backend is None:
            self._last_backend += 1
            backend = self._backends[each] = _Backend(self._last_backend, state)
        backend.state = state
        backend.users.add(address)
        name = _MAPS[_family(each[0])][1]
        value = entries.backend_value(*each, state, self._sizes[name])
        return [Write(Phase.BACKEND, name, entries.backend_key(backend.id), value)]

    def _release(self, each: tuple[str, int, int], address: ServiceAddress, service: int) -> list[Write]:
        """The address does not use the back end any more, which is deleted if nobody does."""
        backend = self._backends[each]
        backend.users.discard(address)
        if backend.users:
            return []
        del self._backends[each]
        phase = Phase.ORPHAN if self._control.orphans_first else Phase.UNUSED
        writes = [Write(phase, _MAPS[_family(each[0])][1], entries.backend_key(backend.id))]
        if self._control.orphans_first:
            key = entries.affinity_match_key(backend.id, service)
            writes.append(Write(Phase.AFFINITY, MapName.AFFINITY_MATCH, key))
        return writes
