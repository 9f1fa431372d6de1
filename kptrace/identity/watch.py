# SPDX-License-Identifier: Apache-2.0
"""List, then watch, for ever: three nested generators, one concern each.

`keep_watching` waits and tries again, `list_then_watch` knows what to ask next, `stream` reads one answer. None of them
knows threads, queues or the store; a message `Listed` marks the end of each list.
"""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from kptrace.identity.api import Api, ApiError, Response, error_for
from kptrace.identity.feed import Alive, Changed, Listed, Message, Rejected, Trouble
from kptrace.identity.fields import ObjectError
from kptrace.identity.objects import decode, name_of
from kptrace.identity.records import Record
from kptrace.identity.resources import Resource
from kptrace.identity.store import Event, Gone

_LIST_TIMEOUT = 60.0
#: A server sends a bookmark about every minute. Nothing at all for this long: the connection is dead.
_SILENCE = 150.0
#: The server is asked to end a watch after this many seconds to twice as many, so that nodes spread over its replicas.
_WATCH_SECONDS = 300
#: A watch that has lived for so many seconds was a good one: the next attempt is not held back.
_HEALTHY = 30.0
_LONGEST_LINE = 16 << 20
_PAGE = "500"


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

    Raises:
        ApiError: if it is `expired`, the cursor is empty: the next call lists, from the server's cache.
    """
    if not cursor.version:
        yield from _list(api, resource, cursor, tools)
    seconds = tools.rng.randint(_WATCH_SECONDS, 2 * _WATCH_SECONDS)
    query = {
        **dict(resource.selectors),
        "watch": "1",
        "allowWatchBookmarks": "true",
        "resourceVersion": cursor.version,
        "timeoutSeconds": str(seconds),
    }
    try:
        for batch in stream(api, resource.path, query):
            yield from _reduce(batch, resource, cursor, tools.clock())
    except ApiError as error:
        if error.reason == "expired":
            cursor.version = ""
        raise


def stream(api: Api, path: str, query: dict[str, str]) -> Iterator[list[dict[str, Any]]]:
    """The events of one watch, in the batches in which they arrive; an empty one says that the server has accepted.

    Raises:
        ApiError: no answer, a refusal, silence, or something that is no watch.
    """
    response = api.get(path, query, read_timeout=_SILENCE)
    try:
        _check(response, path)
        yield []
        rest = b""
        for chunk in response.chunks():
            *lines, rest = (rest + chunk).split(b"\n")
            if len(rest) > _LONGEST_LINE:
                raise ApiError("malformed_stream", f"{path}: an event of more than {_LONGEST_LINE} bytes")
            if events := [_mapping(line, path) for line in lines if line.strip()]:
                yield events
    finally:
        response.close()


def _list(api: Api, resource: Resource, cursor: Cursor, tools: Tools) -> Iterator[Message]:
    # Version 0 is answered from the server's cache; without it, every node's list would go to etcd.
    query = {**dict(resource.selectors), "limit": _PAGE, "resourceVersion": "0"}
    records: list[Record] = []
    rejected: list[Message] = []
    while True:
        response = api.get(resource.path, query, read_timeout=_LIST_TIMEOUT)
        try:
            _check(response, resource.path)
            page = _mapping(response.body(), resource.path)
        finally:
            response.close()
        metadata, items = page.get("metadata") or {}, page.get("items") or []
        if not isinstance(metadata, dict) or not isinstance(items, list):
            raise ApiError("malformed_stream", f"{resource.path}: no list")
        for item in items:
            try:
                records.append(_decode(resource, item))
            except ObjectError as error:
                rejected.append(_rejected(resource, tools.clock(), error))
        if not metadata.get("continue"):
            break
        query = {**dict(resource.selectors), "limit": _PAGE, "continue": str(metadata["continue"])}
    yield from rejected
    yield Listed(resource.scope, tools.clock(), resource.kind, tuple(records))
    cursor.version = str(metadata.get("resourceVersion") or "0")


def _reduce(batch: list[dict[str, Any]], resource: Resource, cursor: Cursor, at: float) -> Iterator[Message]:
    """The messages of one batch; the cursor moves only when they have been taken."""
    events: list[Event] = []
    version = cursor.version
    for line in batch:
        raw, change = line.get("object"), line.get("type")
        if not isinstance(raw, dict):
            raise ApiError("malformed_stream", f"{resource.path}: an event without an object")
        if change == "ERROR":
            code = raw.get("code")
            raise error_for(
                code if isinstance(code, int) else 500, resource.path, str(raw.get("reason") or "")
            )
        metadata = raw.get("metadata")
        if isinstance(metadata, dict):
            version = str(metadata.get("resourceVersion") or version)
        try:
            if change == "DELETED":
                events.append(Gone(resource.kind, name_of(raw)))
            elif change != "BOOKMARK":
                events.append(_decode(resource, raw))
        except ObjectError as error:
            yield _rejected(resource, at, error)
    yield Changed(resource.scope, at, tuple(events)) if events else Alive(resource.scope, at)
    cursor.version = version


def _decode(resource: Resource, raw: Any) -> Record:
    if not isinstance(raw, dict):
        raise ObjectError("", "a mapping", raw)
    return decode(resource.kind, raw)


def _rejected(resource: Resource, at: float, error: ObjectError) -> Rejected:
    return Rejected(resource.scope, at, f"{error.path or 'the object'}: expected {error.expected}")


def _mapping(data: bytes, path: str) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ApiError("malformed_stream", f"{path}: no JSON") from error
    if not isinstance(value, dict):
        raise ApiError("malformed_stream", f"{path}: no JSON object")
    return value


def _check(response: Response, path: str) -> None:
    if response.status != 200:
        raise error_for(response.status, path, retry_after=response.retry_after)
