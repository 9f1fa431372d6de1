# SPDX-License-Identifier: Apache-2.0
"""Cilium's maps as plain dictionaries that the experiments' agent writes to, and a `ServiceState` that is told of it."""

import ipaddress
import struct
from collections.abc import Iterable, Iterator
from functools import cache

from kptrace.dataplanes.cilium.layout_table import LAYOUTS
from kptrace.dataplanes.cilium.layouts import KERNEL_NAME, Layout, Role
from kptrace.dataplanes.cilium.recognise import recognise
from kptrace.dataplanes.cilium.service_effect import Effect, FrontendChange
from kptrace.dataplanes.cilium.service_state import FAMILY_OF, ServiceState
from kptrace.experiments.cilium_layouts import CONTROLS, MapName, Version
from kptrace.experiments.cilium_layouts import LAYOUTS as MADE
from kptrace.experiments.cilium_writes import ServiceTable, Write
from kptrace.model.identity import Endpoint, ServiceAddress

Where = tuple[str, int]


@cache
def role_of(name: MapName, version: Version) -> Role:
    """The role of one of the agent's maps."""
    spec = MADE[version][name]
    found = recognise(spec.name, spec.name[:KERNEL_NAME], spec.type, spec.key_size, spec.value_size)
    assert isinstance(found, Layout)
    return found.role


def layouts_of(version: Version) -> dict[Role, Layout]:
    """The layouts that are read, by role."""
    names = {spec.name for spec in MADE[version].values()}
    return {layout.role: layout for layout in LAYOUTS if layout.name in names and layout.role in FAMILY_OF}


class Agent:
    """An agent, the maps that it wrote, and what was told of them.

    Attributes:
        maps: their contents.
        state: told of every write.
    """

    def __init__(self, version: Version = Version.CURRENT) -> None:
        """Empty maps."""
        self.layouts = layouts_of(version)
        self.state = ServiceState(self.layouts)
        self.maps: dict[Role, dict[bytes, bytes]] = {role: {} for role in FAMILY_OF}
        self.table = ServiceTable(
            CONTROLS[version], {name: spec.value_size for name, spec in MADE[version].items()}
        )
        self._version = version
        self._protocol = CONTROLS[version].protocol_in_keys

    def update(
        self, address: ServiceAddress, endpoints: Iterable[Endpoint], flags: int = 0
    ) -> Iterator[Effect]:
        """Give an address these endpoints, and hand out what each write did."""
        return self.apply(self.table.update(address, list(endpoints), flags=flags))

    def remove(self, address: ServiceAddress) -> Iterator[Effect]:
        """Take an address away, and hand out what each write did."""
        return self.apply(self.table.remove(address))

    def apply(self, writes: Iterable[Write]) -> Iterator[Effect]:
        """Write one entry after the other, to maps that are looked into; what is not there is not deleted."""
        for write in writes:
            role = role_of(write.map, self._version)
            if role in FAMILY_OF and write.value is not None:
                self.maps[role][write.key] = write.value
                yield self.state.write(role, write.key, write.value)
            elif role in FAMILY_OF and self.maps[role].pop(write.key, None) is not None:
                yield self.state.delete(role, write.key)

    def reached(self, address: ServiceAddress) -> set[Where]:
        """Who is to be found at an address, by walking through the maps as the datapath does."""
        six = ":" in address.ip
        services = self.maps[Role.LB6_SERVICES if six else Role.LB4_SERVICES]
        backends = self.maps[Role.LB6_BACKENDS if six else Role.LB4_BACKENDS]
        head = ipaddress.ip_address(address.ip).packed + struct.pack(">H", address.port)
        tail = bytes((address.protocol if self._protocol else 0, 0, 0, 0))

        def service(slot: int) -> bytes:
            return services.get(head + struct.pack("=H", slot) + tail, bytes(12))

        found = set()
        for slot in range(1, struct.unpack_from("=H", service(0), 4)[0] + 1):
            backend = backends.get(service(slot)[:4])
            if backend is not None:
                width = 16 if six else 4
                port = int.from_bytes(backend[width : width + 2], "big")
                found.add((str(ipaddress.ip_address(backend[:width])), port))
        return found


def changes_at(effect: Effect, address: ServiceAddress) -> list[FrontendChange]:
    """What a write did at one address."""
    return [each for each in effect.changes if each.frontend[:2] == (address.ip, address.port)]
