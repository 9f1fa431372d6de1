# SPDX-License-Identifier: Apache-2.0
"""The programming signal of Cilium: which write of its service maps made an API change true in the kernel."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, Protocol

from kptrace.dataplanes.cilium.detect import Datapath
from kptrace.dataplanes.cilium.layouts import Role
from kptrace.dataplanes.cilium.service_effect import Effect
from kptrace.dataplanes.cilium.service_state import FAMILY_OF, ServiceState
from kptrace.dataplanes.cilium.told import CiliumTold
from kptrace.dataplanes.service_index import ServiceIndex
from kptrace.identity.differences import Difference
from kptrace.model.identity import ServiceAddress
from kptrace.model.metrics import MetricFamily, MetricSpec
from kptrace.model.netfilter import DataPlane
from kptrace.model.rewrite import Outcome
from kptrace.model.signal import MechanismState, State
from kptrace.signals.clocks import unix_ns
from kptrace.signals.map_write_records import MapWrite
from kptrace.signals.programming_account import ProgrammingAccount
from kptrace.signals.programming_events import Commit, Result
from kptrace.signals.programming_metrics import SPECS

#: The class of the process whose changes these are: another one that writes the maps does its work.
WRITER: Final = "cilium-agent"
#: Writes that wait while the maps are read.
MAX_BUFFERED: Final = 1 << 16

Deliver = Callable[[ServiceState, int], None]


class Names(Protocol):
    """What is needed of the identity."""

    @property
    def followed(self) -> bool:
        """Whether all Services and EndpointSlices were listed."""
        ...

    def index(self) -> ServiceIndex:
        """All Service ports with their addresses, as they are now: the caller's own."""
        ...


class DatapathProgramming:
    """Implements `kptrace.model.signal.Source`. Everything that is told it is told on the loop's thread.

    The maps are read once, and from then on kept up by every write that others trace, so that each write shows what became
    reachable by it, and what not any more. After a lost record they are read again.
    """

    name = "datapath_programming"

    def __init__(
        self,
        names: Names,
        read: Callable[[Deliver], None],
        *,
        lost: Callable[[], int] = lambda: 0,
        record: Callable[[Result], str] = lambda _: "",
        clock: Callable[[], int] = time.monotonic_ns,
        unix: Callable[[int], int] = unix_ns,
    ) -> None:
        """Nothing is pending.

        Args:
            names: of Services.
            read: has the service maps read, and what is in them delivered with the time at which reading began.
            lost: how many writes may have been missed so far.
            record: keeps a change that is worth it; returns the record's number, or nothing.
            clock: CLOCK_MONOTONIC, ns.
            unix: the time since 1970 of a time by that clock, ns.
        """
        self._names = names
        self._read = read
        self._lost = lost
        self._clock = clock
        self._missed = lost()
        self._account = ProgrammingAccount(WRITER, record, unix)
        self._index: ServiceIndex | None = None
        self._state: ServiceState | None = None
        self._ids: Mapping[Role, int] = {}
        self._roles: Mapping[int, Role] = {}
        self._buffer: deque[MapWrite] | None = None
        self._overflow = 0

    def seen(self, datapath: Datapath) -> None:
        """What of Cilium is there: other service maps than before are read."""
        ids = {role: found[0].info.id for role, found in datapath.maps.items() if role in FAMILY_OF}
        if ids == self._ids:
            return
        self._ids = ids
        self._roles = {number: role for role, number in ids.items()}
        self._state = None
        self._account.reset()
        if ids:
            self._reload()

    def difference(self, difference: Difference) -> None:
        """A Service is to be programmed differently."""
        if self._index is not None:
            _follow(self._index, difference)
        if self._ids:
            self._account.difference(difference)

    def written(self, write: MapWrite) -> None:
        """A call that wrote to a map of Cilium's, or failed to, in the order in which they ended."""
        if write.map_id not in self._roles:
            return
        if self._buffer is not None:
            if len(self._buffer) < MAX_BUFFERED:
                self._buffer.append(write)
            else:
                self._overflow += 1
        elif self._state is not None:
            self._apply(self._state, write)

    def settled(self, until_ns: int) -> None:
        """All writes are known up to this time."""
        missed = self._lost()
        if missed != self._missed:
            self._missed = missed
            self._doubt()
        self._account.settled(until_ns)

    def _doubt(self) -> None:
        """What the maps hold is not known for certain."""
        self._account.lost()
        if self._ids and self._buffer is None:
            self._reload()

    def _reload(self) -> None:
        self._buffer = deque()
        self._read(self._loaded)

    def _loaded(self, state: ServiceState, begin_ns: int) -> None:
        buffered, self._buffer = self._buffer or deque(), None
        self._state = state
        if self._overflow:
            self._overflow = 0
            self._doubt()
            return
        # What was written meanwhile may be in the maps as read: then nobody can say which write did it.
        self._account.lost()
        for write in buffered:
            if write.end_ns >= begin_ns:
                self._apply(state, write)

    def _apply(self, state: ServiceState, write: MapWrite) -> None:
        role = self._roles[write.map_id]
        if write.truncated:
            self._doubt()
            return
        for key, value in write.entries[: write.count]:
            effect = state.write(role, key, value) if write.command.adds else state.delete(role, key)
            if effect:
                self._commit(effect, write)

    def _commit(self, effect: Effect, write: MapWrite) -> None:
        if self._index is None:
            if not self._names.followed:
                return
            self._index = self._names.index()
        told = CiliumTold(effect, self._index)
        self._account.commit(
            Commit(
                DataPlane.CILIUM,
                effect.family,
                WRITER,
                Outcome.COMMITTED,
                write.begin_ns,
                write.end_ns,
                write.begin_ns,
                told,
                told.ports(),
            )
        )

    def losses(self) -> Mapping[tuple[str, str], int]:
        """None of its own: what others lost is read again."""
        return {}

    def status(self, *, names: bool) -> Mapping[str, object]:
        """What /status shows of it."""
        if not self._ids:
            return {}
        section = {**self._account.section(self._clock()), "writes with an effect": self._account.commits}
        return {"datapath programming": section, "datapath changes": self._account.rows(names=names)}

    def explain(self, namespace: str, name: str) -> Mapping[str, object]:
        """What is known of one Service: its last changes."""
        return {"datapath changes": self._account.rows(names=True, of=(namespace, name))} if self._ids else {}

    def describe(self) -> Sequence[MetricSpec]:
        """See `Source`."""
        return SPECS

    def families(self) -> Iterable[MetricFamily]:
        """See `Source`."""
        return self._account.families(self._clock()) if self._ids else ()

    def states(self) -> Sequence[MechanismState]:
        """See `Source`."""
        state, reason, detail = State.ACTIVE, "ok", ""
        if not self._ids:
            state, reason, detail = State.OFF, "absent", "no service maps of Cilium's are in the kernel"
        elif not self._names.followed:
            state, reason = State.DEGRADED, "starting"
            detail = "Services, EndpointSlices and this node are not all listed yet"
        elif self._state is None:
            state, reason, detail = State.DEGRADED, "reading", "the service maps are being read"
        elif not self._state.families:
            state, reason = State.DEGRADED, "unknown_layout"
            detail = "of no IP family both the service and the back end map can be read"
        return [MechanismState(self.name, "map_write", state, reason, detail)]


def _follow(index: ServiceIndex, difference: Difference) -> None:
    """Keep the index up with a Service's addresses."""
    for port in {port for port, _ in difference.before} - {port for port, _ in difference.after}:
        index.remove(port)
    for port in {port for port, _ in difference.after}:
        addresses, node_port = [], 0
        for (each, _), wanted in difference.after.items():
            if each != port:
                continue
            for ip, number in wanted.addresses:
                if ip:
                    addresses.append(ServiceAddress(ip, number, port.protocol))
                else:
                    node_port = number
        index.add(port, addresses, node_port)
