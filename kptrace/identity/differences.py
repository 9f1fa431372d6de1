# SPDX-License-Identifier: Apache-2.0
"""What messages change of what kube-proxy is to program on this node, one Service at a time. Owns nothing; no I/O."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from kptrace.identity.eligible import Place, Wanted, wanted
from kptrace.identity.feed import Alive, Changed, Listed, Message, Trouble
from kptrace.identity.records import Kind, Name, NodeRecord, Record, ServiceRecord, SliceRecord
from kptrace.identity.store import Event, Store
from kptrace.model.identity import ServicePort
from kptrace.model.netfilter import IpFamily

#: What is programmed follows from these.
KINDS: Final = frozenset({Kind.SERVICES, Kind.ENDPOINT_SLICES, Kind.NODES})
#: After a watch was broken, what arrives so soon may have been waiting for us: kube-proxy may have had it before.
CATCH_UP_SECONDS: Final = 2.0
#: Services that changed last, of which it is kept what they are to have: those change most.
MAX_KNOWN: Final = 256

Programmed = Mapping[tuple[ServicePort, IpFamily], Wanted]


@dataclass(frozen=True, slots=True)
class Difference:
    """One Service before and after an event.

    Attributes:
        before, after: what it was to have on this node, and what it is to have now.
        received_ns: when the event's bytes arrived, CLOCK_MONOTONIC.
        trigger_ns: the annotation's time in ns since the epoch where the event brought a new one, else 0.
        late: whether a list told of it, or a watch that had been broken: when it could have been known is not known.
    """

    before: Programmed
    after: Programmed
    received_ns: int
    trigger_ns: int = 0
    late: bool = False


class Differences:
    """Applies messages to the store, and tells what they change. Until everything was listed once they change nothing."""

    def __init__(self, store: Store, scopes: Iterable[str], node: str = "") -> None:
        """Nothing is listed.

        Args:
            store: where messages are applied.
            scopes: of the feed: what is watched.
            node: this node's name; empty where unknown.
        """
        self._store = store
        self._node = node
        self._missing = {kind for kind in KINDS if f"watch_{kind}" in set(scopes)}
        self._complete = {Kind.SERVICES, Kind.ENDPOINT_SLICES} <= self._missing
        self._broken: set[str] = set()
        self._late_until: dict[str, float] = {}
        self._known: OrderedDict[Name, Programmed] = OrderedDict()
        self._listeners: list[Callable[[Difference], None]] = []

    @property
    def ready(self) -> bool:
        """Whether all that it takes is watched and was listed."""
        return self._complete and not self._missing

    def listen(self, listener: Callable[[Difference], None]) -> None:
        """Tell this one too from now on. Without a listener nothing is worked out."""
        self._listeners.append(listener)

    def names(self) -> tuple[Name, ...]:
        """The Services that there are."""
        return tuple(self._store.services())

    def wanted(self, name: Name) -> Programmed:
        """What a Service is to have on this node now."""
        place = Place(self._node, self._store.zone(self._node))
        return wanted(self._store.service(name), self._store.slices_of(name), place)

    def apply(self, message: Message) -> None:
        """Take a message in."""
        match message:
            case Trouble():
                self._broken.add(message.scope)
            case Listed():
                self._mend(message)
                self._apply(self._store.events_of(message.kind, message.records), message.at, late=True)
                self._missing.discard(message.kind)
            case Changed():
                self._mend(message)
                late = message.at < self._late_until.get(message.scope, 0.0)
                for event in message.events:
                    self._apply((event,), message.at, late=late)
            case Alive():
                self._mend(message)

    def _mend(self, message: Listed | Changed | Alive) -> None:
        if message.scope in self._broken:
            self._broken.discard(message.scope)
            self._late_until[message.scope] = message.at + CATCH_UP_SECONDS

    def _apply(self, events: Iterable[Event], at: float, *, late: bool) -> None:
        if not self._listeners or not self.ready:
            for event in events:
                self._store.apply(event, at)
            return
        before: dict[Name, Programmed] = {}
        trigger = 0

        def about_to(old: Record | None, new: Record | None) -> None:
            nonlocal trigger
            trigger = _trigger(old, new)
            for name in self._touched(old, new):
                if name not in before:
                    known = self._known.pop(name, None)
                    before[name] = self.wanted(name) if known is None else known

        for event in events:
            self._store.apply(event, at, about_to)
        received = round(at * 1e9)
        for name, was in before.items():
            now = self._known[name] = self.wanted(name)
            if len(self._known) > MAX_KNOWN:
                self._known.popitem(last=False)
            if now != was:
                difference = Difference(was, now, received, 0 if late else trigger, late)
                for listener in self._listeners:
                    listener(difference)

    def _touched(self, old: Record | None, new: Record | None) -> Iterable[Name]:
        for record in (old, new):
            match record:
                case ServiceRecord():
                    yield record.key
                case SliceRecord() if record.service:
                    yield record.namespace, record.service
                case NodeRecord() if record.name == self._node and _zone(old) != _zone(new):
                    yield from self._store.services()


def _zone(record: Record | None) -> str:
    return record.zone if isinstance(record, NodeRecord) else ""


def _trigger(old: Record | None, new: Record | None) -> int:
    """The annotation's time, if the slice did not have it before."""
    if not isinstance(new, SliceRecord):
        return 0
    return 0 if isinstance(old, SliceRecord) and old.trigger_ns == new.trigger_ns else new.trigger_ns
