# SPDX-License-Identifier: Apache-2.0
"""What is counted of Cilium's maps: frontends, packets by reason; and how often each map may be read. Pure."""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final, TypeVar

from kptrace.dataplanes.cilium.layouts import Layout, Role
from kptrace.dataplanes.cilium.reasons import is_drop
from kptrace.kernel.maps import split_per_cpu

#: Between two readings of one map, seconds.
LEAST_SECONDS: Final = 30.0
#: All readings together may cost this share of a core.
COST_SHARE: Final = 0.005

Name = TypeVar("Name", bound=Hashable)


def frontend_test(layout: Layout) -> Callable[[bytes], bool]:
    """Tells of a key of a service map whether it stands for an address and port that is load-balanced.

    What is not: the slots of its back ends, its second entry for traffic from inside the cluster, and entries for all ports
    of an address, which newer agents write to drop what goes to a port without a service.

    Args:
        layout: of the service map; tens of thousands of keys are asked for, so no more of them is decoded than is needed.
    """
    if layout.key is None:
        raise ValueError("what is in this map is not known")
    at = {each.name: slice(each.offset, each.offset + each.size) for each in layout.key.members}
    slot, scope, port = at["slot"], at["scope"], at["port"]

    def test(key: bytes) -> bool:
        return not any(key[slot]) and not any(key[scope]) and any(key[port])

    return test


@dataclass(frozen=True, slots=True)
class Traffic:
    """Packets and their bytes."""

    packets: int = 0
    bytes: int = 0

    def plus(self, more: "Traffic") -> "Traffic":
        """Both together."""
        return Traffic(self.packets + more.packets, self.bytes + more.bytes)

    def since(self, before: "Traffic") -> "Traffic":
        """What came after `before`; all, if the counting began anew."""
        if self.packets < before.packets or self.bytes < before.bytes:
            return self
        return Traffic(self.packets - before.packets, self.bytes - before.bytes)


@dataclass(frozen=True, slots=True, order=True)
class Cause:
    """What `cilium_metrics` counts by, as far as it is shown: its own codes for why, and which way."""

    reason: int
    direction: int


def read_traffic(layout: Layout, key: bytes, value: bytes) -> tuple[Cause, Traffic]:
    """One entry of `cilium_metrics`, all CPUs together.

    Raises:
        ValueError: it is not of the layout's sizes.
    """
    if layout.key is None or layout.value is None:
        raise ValueError("what is in this map is not known")
    why = layout.key.decode(key)
    total = Traffic()
    for part in split_per_cpu(value, layout.value.size):
        found = layout.value.decode(part)
        total = total.plus(Traffic(found["count"], found["bytes"]))
    # Of the byte only the two low bits are the direction.
    return Cause(why["reason"], why["direction"] & 3), total


class TrafficTotals:
    """Adds up what the entries of `cilium_metrics` gained: a total never falls, whatever becomes of an entry or the map."""

    def __init__(self) -> None:
        """Nothing was read."""
        self._map = 0
        self._last: dict[bytes, Traffic] = {}
        self._totals: dict[Cause, Traffic] = {}

    @property
    def totals(self) -> Mapping[Cause, Traffic]:
        """Since the map was made; a copy."""
        return dict(self._totals)

    def take(
        self, map_id: int, entries: Mapping[bytes, tuple[Cause, Traffic]], *, whole: bool = True
    ) -> None:
        """What was read now.

        Args:
            map_id: the kernel's id of the map: of another map everything is new.
            entries: by key.
            whole: whether all entries were read; if not, one that is not here may still be there.
        """
        if map_id != self._map:
            self._map, self._last = map_id, {}
        for key, (cause, now) in entries.items():
            gained = now.since(self._last.get(key, Traffic()))
            self._totals[cause] = self._totals.get(cause, Traffic()).plus(gained)
        read = {key: traffic for key, (_, traffic) in entries.items()}
        self._last = read if whole else {**self._last, **read}


@dataclass(frozen=True, slots=True)
class MapReading:
    """What was found in the maps of one role.

    Attributes:
        entries: in all of them.
        room: for how many entries there is room in all of them.
        fullest: entries of the fullest one, as a share of what it has room for.
        whole: whether all entries were counted; if not, there are more.
        memory: bytes, as the kernel reckons them; None where it does not tell.
        maps: how many there are.
        frontends: of service maps: addresses with a port; None for others.
        at_ns: when they were read, CLOCK_MONOTONIC.
    """

    entries: int = 0
    room: int = 0
    fullest: float = 0.0
    whole: bool = True
    memory: int | None = None
    maps: int = 0
    frontends: int | None = None
    at_ns: int = 0

    def plus_map(self, entries: int, room: int, memory: int | None, *, whole: bool) -> "MapReading":
        """With one more map."""
        return replace(
            self,
            entries=self.entries + entries,
            room=self.room + room,
            fullest=max(self.fullest, entries / room if room else 0.0),
            whole=self.whole and whole,
            memory=self.memory if memory is None else (self.memory or 0) + memory,
            maps=self.maps + 1,
        )


@dataclass(frozen=True, slots=True)
class Inventory:
    """What was found in the maps, each as it was read last.

    Attributes:
        maps: by what they are for.
        traffic: packets by reason and direction, since `cilium_metrics` was made.
        troubles: why a map could not be read.
        failed: readings of a map that failed, since the start.
    """

    maps: Mapping[Role, MapReading] = field(default_factory=dict)
    traffic: Mapping[Cause, Traffic] = field(default_factory=dict)
    troubles: Mapping[Role, str] = field(default_factory=dict)
    failed: int = 0


def periods(
    costs: Mapping[Name, float], least: float = LEAST_SECONDS, share: float = COST_SHARE
) -> dict[Name, float]:
    """How long to wait between two readings of each map, seconds, so that all of them cost at most `share`.

    Small maps are read every `least` seconds; what they leave of the share the large ones have in equal parts.

    Args:
        costs: seconds of a core that a reading of each takes.
        least: no map is read more often.
        share: of a core.
    """
    found: dict[Name, float] = {}
    left = share
    for done, (name, cost) in enumerate(sorted(costs.items(), key=lambda each: each[1])):
        own = left / (len(costs) - done)
        found[name] = max(least, cost / own)
        left -= cost / found[name]
    return found


def verdict(reason: int) -> str:
    """`forwarded`, `dropped`, or `noted` for what is counted beside one of these."""
    if is_drop(reason):
        return "dropped"
    return "noted" if reason else "forwarded"
