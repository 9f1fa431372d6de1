# SPDX-License-Identifier: Apache-2.0
"""From single writes of Cilium's service and back end maps to what packets find there, and since which write. Pure.

An endpoint of a frontend is reachable from the first write after which the master entry covers a slot that names it and
its back end entry is there: mostly the master entry's, but a slot's where that is rewritten below the count. It is gone
with the first write of the master entry, or its deletion, after which no slot from 1 to the count names it. What state the
agent gave a back end does not matter: it puts those that are to be used into the slots that the master entry counts,
terminating ones too if there are no others.
"""

from collections.abc import Iterable, Mapping, Set
from typing import Final

from kptrace.dataplanes.cilium.layouts import Layout, Role
from kptrace.dataplanes.cilium.service_effect import Effect, EndpointAddress, Frontend, FrontendChange
from kptrace.dataplanes.cilium.service_entry import Backends, Entry
from kptrace.dataplanes.cilium.service_map import (
    ServiceFlag,
    ServiceKey,
    ServiceValue,
    decode_backend,
    decode_backend_id,
    decode_service_key,
    decode_service_value,
)
from kptrace.model.identity import ServiceAddress
from kptrace.model.netfilter import IpFamily

#: The maps that are looked into: for each family its service map and its back end map.
MAPS: Final = {
    IpFamily.IPV4: (Role.LB4_SERVICES, Role.LB4_BACKENDS),
    IpFamily.IPV6: (Role.LB6_SERVICES, Role.LB6_BACKENDS),
}
FAMILY_OF: Final = {role: family for family, roles in MAPS.items() for role in roles}
_EXTERNAL, _INTERNAL = 0, 1
_NOBODY: Final[frozenset[EndpointAddress]] = frozenset()


class _Group:
    """The entries of one frontend: for traffic from outside, which is mostly for all, and from inside the cluster."""

    __slots__ = ("entries", "flags", "frontend")

    def __init__(self, frontend: Frontend) -> None:
        self.frontend = frontend
        self.entries: list[Entry | None] = [None, None]  # by scope
        self.flags = 0

    def choice(self) -> Entry | None:
        """What a packet from inside the cluster finds.

        Cilium looks scope 0 up first, and follows to scope 1 where that says that there are two (bpf/lib/lb.h,
        `lb4_lookup_service`). Before there was a flag of its own for that, a policy Local for traffic from outside said so.
        """
        entry, inside = self._at(_EXTERNAL), self._at(_INTERNAL)
        if entry is None or entry.master is None:
            return None
        if entry.master.flags & ServiceFlag.TWO_SCOPES:
            return inside
        return inside or entry if entry.master.flags & ServiceFlag.EXT_LOCAL_SCOPE else entry

    def _at(self, scope: int) -> Entry | None:
        entry = self.entries[scope]
        return entry if entry is not None and entry.master is not None else None


class ServiceState:
    """The contents of the four maps, kept up write by write. For one thread.

    While an agent that knows protocols takes over from one that does not, an address has an entry for any protocol and one
    for its own for a moment; they are two frontends here.
    """

    def __init__(self, layouts: Mapping[Role, Layout]) -> None:
        """Nothing is known yet.

        Args:
            layouts: of the maps that there are; a family needs two of the four roles in `MAPS`.
        """
        self._layouts = {role: layouts[role] for role in FAMILY_OF if role in layouts}
        self._groups: dict[IpFamily, dict[Frontend, _Group]] = {family: {} for family in MAPS}
        self._backends = {family: Backends() for family in MAPS}

    @property
    def families(self) -> frozenset[IpFamily]:
        """The families whose maps can both be read: only of these the effects say who is reachable."""
        return frozenset(
            family for family, roles in MAPS.items() if all(role in self._layouts for role in roles)
        )

    def load(self, role: Role, entries: Iterable[tuple[bytes, bytes]]) -> None:
        """Replace what is known of one map by what is in it; nothing comes or goes by that. After an error load it again.

        Raises:
            ValueError: a key or value is not of the layout's size.
            KeyError: the role has no layout.
        """
        family, layout = FAMILY_OF[role], self._layouts[role]
        backends, groups = self._backends[family], self._groups[family]
        if role is MAPS[family][1]:
            backends.replace(
                (decode_backend_id(layout, key), decode_backend(layout, value)) for key, value in entries
            )
        else:
            groups.clear()
            backends.release()
            for key, value in entries:
                self._put(family, decode_service_key(layout, key), decode_service_value(layout, value))
        for group in groups.values():
            for entry in group.entries:
                if entry is not None:
                    entry.rebuild()

    def write(self, role: Role, key: bytes, value: bytes) -> Effect:
        """An entry was written, with success.

        Raises:
            ValueError: key or value are not of the layout's size.
            KeyError: the role has no layout.
        """
        family, layout = FAMILY_OF[role], self._layouts[role]
        if role is MAPS[family][1]:
            backend = decode_backend(layout, value)
            came = self._backends[family].write(decode_backend_id(layout, key), backend)
            return self._reached(family, came, (backend.ip, backend.port))
        return self._change(family, decode_service_key(layout, key), decode_service_value(layout, value))

    def delete(self, role: Role, key: bytes) -> Effect:
        """An entry was deleted, with success; raises as `write` does."""
        family, layout = FAMILY_OF[role], self._layouts[role]
        if role is MAPS[family][1]:
            self._backends[family].delete(decode_backend_id(layout, key))
            return Effect(family)
        return self._change(family, decode_service_key(layout, key), None)

    def endpoints(self, address: ServiceAddress) -> frozenset[EndpointAddress]:
        """Who became reachable at an address and was not taken away; nobody where there is none."""
        entry = self._at(address)
        return entry.reachable if entry is not None else _NOBODY

    def present(self, address: ServiceAddress) -> bool:
        """Whether an address is answered for, with or without endpoints."""
        return self._at(address) is not None

    def frontends(self, family: IpFamily) -> Iterable[Frontend]:
        """All frontends of a family."""
        return (frontend for frontend, group in self._groups[family].items() if group.choice() is not None)

    def _at(self, address: ServiceAddress) -> Entry | None:
        groups = self._groups[IpFamily.IPV6 if ":" in address.ip else IpFamily.IPV4]
        for protocol in (int(address.protocol), 0):
            group = groups.get(Frontend(address.ip, address.port, protocol))
            entry = group.choice() if group is not None else None
            if entry is not None:
                return entry
        return None

    def _put(self, family: IpFamily, key: ServiceKey, value: ServiceValue) -> None:
        """Note an entry without asking what that does."""
        if not _counts(key):
            return
        group = self._group(family, key)
        entry = self._entry(group, family, key.scope)
        if key.slot:
            entry.slots[key.slot] = value.backend_id
            return
        entry.master = value
        if key.scope == _EXTERNAL:
            group.flags = value.flags

    def _group(self, family: IpFamily, key: ServiceKey) -> _Group:
        frontend = Frontend(key.ip, key.port, key.protocol)
        groups = self._groups[family]
        group = groups.get(frontend)
        if group is None:
            group = groups[frontend] = _Group(frontend)
        return group

    def _entry(self, group: _Group, family: IpFamily, scope: int) -> Entry:
        entry = group.entries[scope]
        if entry is None:
            entry = group.entries[scope] = Entry(group.frontend, self._backends[family])
        return entry

    def _change(self, family: IpFamily, key: ServiceKey, value: ServiceValue | None) -> Effect:
        """A service entry was written or (None) deleted."""
        if not _counts(key):
            return Effect(family)
        group = self._group(family, key)
        entry = self._entry(group, family, key.scope)
        before = group.choice()
        # Who was there is asked only where another entry, or none, may be the one that counts afterwards.
        switches = key.slot == 0 and (
            before is None
            or value is None
            or None not in group.entries
            or bool((value.flags ^ group.flags) & ServiceFlag.TWO_SCOPES)
        )
        had = before.reachable if before is not None and switches else _NOBODY
        added: Set[EndpointAddress]
        removed: Set[EndpointAddress] = _NOBODY
        if key.slot:
            added = entry.point(key.slot, value.backend_id if value is not None else None)
        else:
            added, removed = entry.head(value)
            if value is not None and key.scope == _EXTERNAL:
                group.flags = value.flags
        after = group.choice()
        if entry.empty:
            group.entries[key.scope] = None
            if group.entries == [None, None]:
                del self._groups[family][group.frontend]
        if switches:
            has = after.reachable if after is not None else _NOBODY
            added, removed = has - had, had - has
        elif after is not entry:
            return Effect(family)
        if not added and not removed and (before is None) == (after is None):
            return Effect(family)
        return Effect(family, (_told(group, before, after, added, removed),))

    def _reached(self, family: IpFamily, came: Iterable[Entry], address: EndpointAddress) -> Effect:
        """An endpoint became reachable by these entries, since its own is there now."""
        changes = []
        for entry in came:
            group = self._groups[family][entry.frontend]
            if group.choice() is entry:
                changes.append(_told(group, entry, entry, {address}, _NOBODY))
        return Effect(family, tuple(changes))


def _counts(key: ServiceKey) -> bool:
    """Whether it is a service's. Newer agents write a drop entry for all other ports of an address."""
    return key.port != 0 and key.scope in (_EXTERNAL, _INTERNAL)


def _told(
    group: _Group,
    before: Entry | None,
    after: Entry | None,
    added: Set[EndpointAddress],
    removed: Set[EndpointAddress],
) -> FrontendChange:
    return FrontendChange(
        group.frontend,
        group.flags,
        appeared=before is None and after is not None,
        vanished=before is not None and after is None,
        present=after is not None,
        added=frozenset(added),
        removed=frozenset(removed),
        endpoints=after.reachable if after is not None else _NOBODY,
    )
