# SPDX-License-Identifier: Apache-2.0
"""Which endpoints one master entry and its slots lead to, kept up change by change at the cost of what changes. Pure.

A large cluster has 10,000 master entries and 50,000 back ends: so nothing is kept here that is there in another form.
"""

from collections.abc import Iterable

from kptrace.dataplanes.cilium.service_effect import EndpointAddress, Frontend
from kptrace.dataplanes.cilium.service_map import Backend, ServiceValue


class Backends:
    """The back end entries of one IP family, and the service entries that lead to them.

    The address behind an id is remembered for as long as a slot refers to it: newer agents delete a back end before the
    slots that name it.

    Attributes:
        users: the service entries that refer to an id by a slot that is chosen from, each once.
    """

    def __init__(self) -> None:
        self.users: dict[int, tuple[Entry, ...]] = {}
        self._addresses: dict[int, EndpointAddress] = {}
        self._gone: dict[int, EndpointAddress] = {}

    def write(self, backend_id: int, backend: Backend) -> list["Entry"]:
        """A back end's entry was written; returns the service entries by which it became reachable by that."""
        before, now = self.address(backend_id), (backend.ip, backend.port)
        self._gone.pop(backend_id, None)
        if backend_id not in self._addresses or before != now:
            self._addresses[backend_id] = now
        users = self.users.get(backend_id, ())
        if before != now:
            for entry in users:
                entry.lose(before)
                entry.gain(now)
        return [entry for entry in users if entry.tell(now)]

    def delete(self, backend_id: int) -> None:
        """A back end's entry was deleted: it is still to be taken out of the services that refer to it."""
        address = self._addresses.pop(backend_id, None)
        if address is not None and backend_id in self.users:
            self._gone[backend_id] = address

    def replace(self, backends: Iterable[tuple[int, Backend]]) -> None:
        """Only these are there, and nobody refers to them yet."""
        self._addresses = {number: (each.ip, each.port) for number, each in backends}
        self.release()

    def release(self) -> None:
        """Nobody refers to any of them."""
        self._gone = {}
        self.users = {}

    def address(self, backend_id: int) -> EndpointAddress | None:
        """Where a back end is, or was last if it is gone."""
        return self._addresses.get(backend_id) or self._gone.get(backend_id)

    def present(self, backend_id: int) -> bool:
        """Whether its entry is there."""
        return backend_id in self._addresses

    def leave(self, backend_id: int, entry: "Entry") -> None:
        """A service entry does not refer to it any more."""
        users = tuple(each for each in self.users[backend_id] if each is not entry)
        if users:
            self.users[backend_id] = users
        else:
            del self.users[backend_id]
            self._gone.pop(backend_id, None)


class Entry:
    """A master entry and its slots: one frontend in one scope.

    Attributes:
        frontend: which.
        master: its value; None while there is none.
        slots: back end ids by slot, those too that are not chosen from.
    """

    __slots__ = ("_again", "_backends", "_reach", "_waiting", "frontend", "master", "slots")

    def __init__(self, frontend: Frontend, backends: Backends) -> None:
        """Nothing is there.

        Args:
            frontend: which.
            backends: of the same IP family.
        """
        self.frontend = frontend
        self.master: ServiceValue | None = None
        self.slots: dict[int, int] = {}
        self._backends = backends
        # How many back end ids lead to an endpoint: 0 for who is to go with the next master entry.
        self._reach: dict[EndpointAddress, int] = {}
        # Of those, who never became reachable: the back end's entry was gone when the slot was written.
        self._waiting: frozenset[EndpointAddress] = frozenset()
        # How many more slots than one refer to an id: no agent does that, but for a moment.
        self._again: dict[int, int] | None = None

    @property
    def empty(self) -> bool:
        """Whether nothing of it is left."""
        return self.master is None and not self.slots

    @property
    def reachable(self) -> frozenset[EndpointAddress]:
        """Endpoints that became reachable and were not taken away since."""
        return frozenset(self._reach) - self._waiting

    def point(self, slot: int, backend_id: int | None) -> set[EndpointAddress]:
        """A slot was written or (None) deleted; returns the endpoints that became reachable."""
        before = self.slots.get(slot)
        if backend_id is None:
            self.slots.pop(slot, None)
        else:
            self.slots[slot] = backend_id
        if self.master is None or slot > self.master.count or before == backend_id:
            return set()
        self._drop(before)
        return self._refer(backend_id)

    def head(self, master: ServiceValue | None) -> tuple[set[EndpointAddress], set[EndpointAddress]]:
        """The master entry was written or (None) deleted.

        Returns:
            The endpoints that became reachable, and those that are not any more. An agent that puts a back end in the
            middle rewrites slot by slot: between two writes another one is in no slot, and back in the next. So who is in
            none is gone only when the agent says that it is done, with the master entry, which both of Cilium's ways to
            write end with.
        """
        before, now = (each.count if each is not None else 0 for each in (self.master, master))
        self.master = master
        came: set[EndpointAddress] = set()
        for slot in range(before + 1, now + 1):
            came |= self._refer(self.slots.get(slot))
        for slot in range(now + 1, before + 1):
            self._drop(self.slots.get(slot))
        went = {address for address, ways in self._reach.items() if not ways}
        for address in went:
            del self._reach[address]
        told = went - self._waiting
        self._waiting -= went
        return came, told

    def rebuild(self) -> None:
        """Look everything up anew, after `Backends.replace`."""
        master, self.master = self.master, None
        self._reach, self._waiting, self._again = {}, frozenset(), None
        self.head(master)

    def gain(self, address: EndpointAddress) -> None:
        """One more back end id leads to an endpoint, which is not told thereby."""
        if address not in self._reach:
            self._waiting |= {address}
        self._reach[address] = self._reach.get(address, 0) + 1

    def lose(self, address: EndpointAddress | None) -> None:
        """One back end id less leads to an endpoint."""
        if address is not None:
            self._reach[address] -= 1

    def tell(self, address: EndpointAddress) -> bool:
        """An endpoint to which a back end id leads is reachable; returns whether that is new."""
        new = address in self._waiting
        if new:
            self._waiting -= {address}
        return new

    def _refer(self, backend_id: int | None) -> set[EndpointAddress]:
        if backend_id is None:
            return set()
        users = self._backends.users.get(backend_id, ())
        if self in users:
            self._again = self._again if self._again is not None else {}
            self._again[backend_id] = self._again.get(backend_id, 0) + 1
            return set()
        self._backends.users[backend_id] = (*users, self)
        address = self._backends.address(backend_id)
        if address is None:
            return set()
        if self._backends.present(backend_id):
            return self._arrive(address)
        self.gain(address)
        return set()

    def _arrive(self, address: EndpointAddress) -> set[EndpointAddress]:
        new = address not in self._reach or self.tell(address)
        self._reach[address] = self._reach.get(address, 0) + 1
        return {address} if new else set()

    def _drop(self, backend_id: int | None) -> None:
        if backend_id is None:
            return
        if self._again and backend_id in self._again:
            self._again[backend_id] -= 1
            if not self._again[backend_id]:
                del self._again[backend_id]
            return
        self.lose(self._backends.address(backend_id))
        self._backends.leave(backend_id, self)
