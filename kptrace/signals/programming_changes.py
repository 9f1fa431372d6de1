# SPDX-License-Identifier: Apache-2.0
"""From what a Service is to have before and after an event to changes. Pure.

Only what kube-proxy would program differently is a change: an update of anything else gives none, and so does a list that
finds what was known.
"""

from collections.abc import Iterable, Mapping

from kptrace.identity.eligible import Address, Wanted
from kptrace.model.identity import ServicePort
from kptrace.model.netfilter import IpFamily
from kptrace.signals.programming_events import Change, ChangeKind

State = Mapping[tuple[ServicePort, IpFamily], Wanted]

_ENDPOINT = ChangeKind.ENDPOINT_REMOVED, ChangeKind.ENDPOINT_ADDED
_SERVICE = ChangeKind.SERVICE_REMOVED, ChangeKind.SERVICE_ADDED


def changes_between(before: State, after: State, received_ns: int, trigger_ns: int = 0) -> tuple[Change, ...]:
    """The changes that an event makes, removals first.

    A Service port that comes or goes is one change, with its endpoints and all its addresses.

    Args:
        before: what the Service is to have had until then (`identity.eligible.wanted`).
        after: what it is to have now.
        received_ns: when the event's bytes arrived.
        trigger_ns: the annotation's time, where the event is one of an EndpointSlice whose annotation is another than
            the slice had before; 0 otherwise: an old annotation tells of an old change.
    """
    found: list[Change] = []
    for port, family in dict.fromkeys((*before, *after)):
        old, new = before.get((port, family)), after.get((port, family))
        if old is None or new is None:
            state, kind = (new, _SERVICE[1]) if old is None else (old, _SERVICE[0])
            if state is not None:
                bare = not (new and new.endpoints)
                addresses = tuple(sorted(state.addresses))
                found.append(Change(kind, port, family, received_ns, bare=bare, addresses=addresses))
            continue
        bare = not new.endpoints
        for kinds, was, now, trigger in (
            (_SERVICE, old.addresses, new.addresses, 0),
            (_ENDPOINT, old.endpoints, new.endpoints, trigger_ns),
        ):
            found.extend(
                Change(kind, port, family, received_ns, ip, number, bare=bare, trigger_ns=trigger)
                for kind, (ip, number) in _difference(kinds, was, now)
            )
    return tuple(sorted(found, key=lambda change: change.kind.added))


def _difference(
    kinds: tuple[ChangeKind, ChangeKind], was: frozenset[Address], now: frozenset[Address]
) -> Iterable[tuple[ChangeKind, Address]]:
    yield from ((kinds[0], address) for address in sorted(was - now))
    yield from ((kinds[1], address) for address in sorted(now - was))
