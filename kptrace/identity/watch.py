# SPDX-License-Identifier: Apache-2.0
"""List, then watch, for ever: three nested generators, one concern each.

`keep_watching` waits and tries again, `list_then_watch` knows what to ask next, `streaming` reads one answer. None of them
knows threads, queues or the store; a message `Listed` marks the end of each list.
"""

import math
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from kptrace.identity.api import Api, ApiError
from kptrace.identity.feed import Alive, Changed, Listed, Message, Trouble
from kptrace.identity.fields import ObjectError
from kptrace.identity.listing import ListReader
from kptrace.identity.objects import decode_bytes
from kptrace.identity.records import Name, Record
from kptrace.identity.resources import Resource
from kptrace.identity.store import Event, Gone
from kptrace.identity.streaming import check, read, rejection, stream

_LIST_TIMEOUT = 60.0
#: The server is asked to end a watch after this many seconds to twice as many, so that nodes spread over its replicas.
_WATCH_SECONDS = 300
#: A watch that has lived for so many seconds was a good one: the next attempt is not held back.
_HEALTHY = 30.0
#: While thousands of objects come, it is said now and then that they do.
_TELL_SECONDS = 1.0
_PAGE = "500"
#: By these an API server refuses to begin a watch with the objects that there are (before 1.32, or on an old etcd).
_NO_INITIAL_EVENTS = frozenset({400, 405, 422})


class Backoff:
    """Growing pauses: 1 s doubled up to 60 s, each at a random half to whole of that."""

    def __init__(self, rng: random.Random, *, first: float = 1.0, longest: float = 60.0) -> None:
        self._rng = rng
        self._first = self._next = first
        self._longest = longest

    def next(self) -> float:
        """Seconds to wait now."""
        pause, self._next = self._next, min(self._next * 2, self._longest)
        return pause * self._rng.uniform(0.5, 1.0)

    def reset(self) -> None:
        """Start small again: the server has something to say."""
        self._next = self._first


@dataclass(slots=True)
class Cursor:
    """Where the watch goes on; without a version it starts with a list."""

    version: str = ""


@dataclass(frozen=True, slots=True)
class Tools:
    """What the generators need from outside.

    Attributes:
        clock: monotonic seconds.
        pause: waits this many seconds; false: end now.
        rng: for jitter.
    """

    clock: Callable[[], float]
    pause: Callable[[float], bool]
    rng: random.Random


def keep_watching(api: Api, resource: Resource, tools: Tools) -> Iterator[Message]:
    """Watch until `tools.pause` says to end; every failure is a `Trouble`, a pause, and another try from there."""
    backoff, cursor = Backoff(tools.rng), Cursor()
    while True:
        asked, began = 0.0, tools.clock()
        try:
            for message in list_then_watch(api, resource, cursor, tools):
                # Not yet when the server merely accepts: what it says first may be that the version has expired.
                if isinstance(message, Changed) or tools.clock() - began > _HEALTHY:
                    backoff.reset()
                yield message
        except ApiError as error:
            asked = error.retry_after
            yield Trouble(resource.scope, tools.clock(), error.reason, str(error))
        if not tools.pause(max(asked, backoff.next())):
            return


def list_then_watch(api: Api, resource: Resource, cursor: Cursor, tools: Tools) -> Iterator[Message]:
    """List unless the cursor knows where to go on, then watch until one stream ends without an error.

    A list is a watch that begins with all objects, where the server can do that: neither side then ever holds them all
    as text. Elsewhere, and always for both, it is from the server's cache.

    Raises:
        ApiError: if it is `expired`, the cursor is empty: the next call lists, from the server's cache.
    """
    try:
        if not cursor.version:
            try:
                yield from _watch(api, resource, cursor, tools, initial={})
            except ApiError as error:
                if error.status not in _NO_INITIAL_EVENTS:
                    raise
            else:
                return
            yield from _list(api, resource, cursor, tools)
        yield from _watch(api, resource, cursor, tools)
    except ApiError as error:
        if error.reason == "expired":
            cursor.version = ""
        raise


def _watch(
    api: Api, resource: Resource, cursor: Cursor, tools: Tools, *, initial: dict[Name, Record] | None = None
) -> Iterator[Message]:
    """Watch from the cursor; with `initial`, where all objects are collected, from nothing.

    The cursor moves only when what leads to it has been taken, and with `initial` not before all objects have come.
    """
    seconds = tools.rng.randint(_WATCH_SECONDS, 2 * _WATCH_SECONDS)
    begin = {} if initial is None else {"sendInitialEvents": "true", "resourceVersionMatch": "NotOlderThan"}
    query = {
        **dict(resource.selectors),
        **begin,
        "watch": "1",
        "allowWatchBookmarks": "true",
        "resourceVersion": cursor.version or "0",
        "timeoutSeconds": str(seconds),
    }
    heard = -math.inf
    for at, lines in stream(api, resource.path, query, tools.clock):
        batch = read(lines, resource, at)
        yield from batch.rejected
        if initial is not None:
            _collect(initial, batch.events)
            if batch.complete:
                yield Listed(resource.scope, at, resource.kind, tuple(initial.values()))
                initial = None
            elif at >= heard + _TELL_SECONDS:
                heard = at
                yield Alive(resource.scope, at)
        elif batch.events:
            yield Changed(resource.scope, at, batch.events)
        else:
            yield Alive(resource.scope, at)
        if initial is None:
            cursor.version = batch.version or cursor.version


def _collect(objects: dict[Name, Record], events: Iterable[Event]) -> None:
    for event in events:
        if isinstance(event, Gone):
            objects.pop(event.key, None)
        else:
            objects[event.key] = event


def _list(api: Api, resource: Resource, cursor: Cursor, tools: Tools) -> Iterator[Message]:
    # Version 0 is answered from the server's cache; without it, every node's list would go to etcd.
    query = {**dict(resource.selectors), "limit": _PAGE, "resourceVersion": "0"}
    records: list[Record] = []
    while True:
        response = api.get(resource.path, query, read_timeout=_LIST_TIMEOUT)
        try:
            check(response, resource.path)
            reader = ListReader(response.chunks(), resource.path)
            for item in reader.items():
                try:
                    records.append(decode_bytes(resource.kind, item)[0])
                except ObjectError as error:
                    yield rejection(resource, tools.clock(), error)
        finally:
            response.close()
        if not reader.more:
            break
        query = {**dict(resource.selectors), "limit": _PAGE, "continue": reader.more}
    yield Listed(resource.scope, tools.clock(), resource.kind, tuple(records))
    cursor.version = reader.version
