# SPDX-License-Identifier: Apache-2.0
"""One watch's answer: lines of JSON as they arrive, and what they say."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import msgspec

from kptrace.identity import wire
from kptrace.identity.api import Api, ApiError, Response, error_for
from kptrace.identity.feed import Rejected
from kptrace.identity.fields import ObjectError
from kptrace.identity.named import name_of
from kptrace.identity.objects import decode_bytes, decode_event, record_of
from kptrace.identity.records import Record
from kptrace.identity.resources import Resource
from kptrace.identity.store import Event, Gone

#: A server sends a bookmark about every minute. Nothing at all for this long: the connection is dead.
_SILENCE = 150.0
_LONGEST_LINE = 16 << 20


class _Line(msgspec.Struct, frozen=True):
    """One event whose object is not decoded yet."""

    type: str
    object: msgspec.Raw


class _Status(msgspec.Struct, frozen=True):
    """The object of an ERROR event."""

    code: int | None = None
    reason: str | None = None


_LINES = msgspec.json.Decoder(_Line)


@dataclass(frozen=True, slots=True)
class Batch:
    """What some lines say.

    Attributes:
        events: objects that came, changed or went.
        rejected: those that could not be decoded.
        version: the last one told; empty where none was.
        complete: whether all that there was before the watch has been told by now.
    """

    events: tuple[Event, ...]
    rejected: tuple[Rejected, ...]
    version: str
    complete: bool


def stream(
    api: Api, path: str, query: dict[str, str], clock: Callable[[], float]
) -> Iterator[tuple[float, list[bytes]]]:
    """The lines of one watch, in the batches in which they arrive, each with the time at which its bytes did.

    The first is empty: the server has accepted.

    Raises:
        ApiError: no answer, a refusal, silence, or an endless line.
    """
    response = api.get(path, query, read_timeout=_SILENCE)
    try:
        check(response, path)
        yield clock(), []
        rest = b""
        for chunk in response.chunks():
            at = clock()  # before anything is decoded: programming latency is counted from here
            *lines, rest = (rest + chunk).split(b"\n")
            if len(rest) > _LONGEST_LINE:
                raise ApiError("malformed_stream", f"{path}: an event of more than {_LONGEST_LINE} bytes")
            if events := [line for line in lines if line.strip()]:
                yield at, events
    finally:
        response.close()


def read(lines: Sequence[bytes], resource: Resource, at: float) -> Batch:
    """What lines that arrived at a time say.

    Raises:
        ApiError: one is an error, or no event.
    """
    events: list[Event] = []
    rejected: list[Rejected] = []
    version, complete = "", False
    for line in lines:
        try:
            event = decode_event(resource.kind, line) or _repaired(line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ApiError("malformed_stream", f"{resource.path}: no event in JSON") from error
        metadata = event.object.metadata or wire.Metadata()
        version = metadata.resource_version or version
        try:
            match event.type:
                case "ERROR":
                    raise _failure(line, resource)
                case "BOOKMARK":
                    complete = complete or bool(
                        metadata.annotations and metadata.annotations.initial_end == "true"
                    )
                case "DELETED":
                    events.append(Gone(resource.kind, name_of(event.object)))
                case _:
                    events.append(_record(event.object, line, resource))
        except ObjectError as error:
            rejected.append(rejection(resource, at, error))
    return Batch(tuple(events), tuple(rejected), version, complete)


def _record(found: wire.Named, line: bytes, resource: Resource) -> Record:
    """The record; of an object with a field of the wrong type the error that names it."""
    if type(found) is wire.Named:
        return decode_bytes(resource.kind, _LINES.decode(line).object)[0]
    return record_of(found)


def _repaired(line: bytes) -> wire.Event[wire.Named]:
    """An event with as much of its object's metadata as can be understood."""
    found = _LINES.decode(line)
    try:
        return wire.Event(found.type, msgspec.json.decode(found.object, type=wire.Named))
    except msgspec.ValidationError:
        return wire.Event(found.type, wire.Named(wire.Metadata(resource_version=_version(found.object))))


def _version(data: msgspec.Raw) -> str:
    """The version of an object whose metadata is wrong elsewhere; empty where it is wrong itself."""
    try:
        metadata = msgspec.json.decode(data, type=wire.Versioned).metadata
    except msgspec.ValidationError:
        return ""
    return metadata.resource_version if metadata else ""


def _failure(line: bytes, resource: Resource) -> ApiError:
    """What an ERROR event says."""
    try:
        status = msgspec.json.decode(_LINES.decode(line).object, type=_Status)
    except msgspec.ValidationError:
        status = _Status()
    return error_for(status.code or 500, resource.path, status.reason or "")


def rejection(resource: Resource, at: float, error: ObjectError) -> Rejected:
    """That an object could not be decoded, without its name."""
    return Rejected(resource.scope, at, f"{error.path or 'the object'}: expected {error.expected}")


def check(response: Response, path: str) -> None:
    """Refuse any answer but 200.

    Raises:
        ApiError: it is another.
    """
    if response.status != 200:
        raise error_for(response.status, path, retry_after=response.retry_after)
