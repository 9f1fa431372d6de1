# SPDX-License-Identifier: Apache-2.0
"""Typed access to the fields of a JSON-like object: missing is fine, of the wrong type is an error with its path."""

import socket
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from kptrace.model.identity import Protocol

T = TypeVar("T")

#: The creation time of an object that does not tell it: it counts as the youngest.
NEWEST = sys.maxsize

_EXPECTED: dict[type, str] = {
    dict: "a mapping",
    list: "a list",
    str: "a string",
    int: "an integer",
    bool: "true or false",
}
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_PROTOCOLS = {"": Protocol.TCP, "TCP": Protocol.TCP, "UDP": Protocol.UDP, "SCTP": Protocol.SCTP}


class ObjectError(ValueError):
    """A Kubernetes object is not what it must be.

    Attributes:
        path: of the field, as in `spec.ports[0].port`.
        expected: what should be there, as in `an integer`.
        found: the value that is there, None for nothing. Texts for everyone leave it out: it may be a name.
    """

    def __init__(self, path: str, expected: str, found: object) -> None:
        shown = (
            "nothing"
            if found is None
            else f"{_EXPECTED.get(type(found), type(found).__name__)} ({found!r:.60})"
        )
        super().__init__(f"{path or 'the object'}: expected {expected}, found {shown}")
        self.path = path
        self.expected = expected
        self.found = found


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def member(raw: Mapping[str, Any], key: str, kind: type[T], path: str) -> T | None:
    """The value of one field, or None where it is missing or null.

    Raises:
        ObjectError: it is of another type (true is no integer).
    """
    value = raw.get(key)
    if value is None or type(value) is kind:
        return value
    raise ObjectError(_join(path, key), _EXPECTED[kind], value)


def members(raw: Mapping[str, Any], key: str, kind: type[T], path: str) -> Sequence[T]:
    """The values of a list field, none where it is missing or null.

    Raises:
        ObjectError: it is no list, or an item is of another type.
    """
    values = raw.get(key)
    if values is None:
        return ()
    if type(values) is not list:
        raise ObjectError(_join(path, key), "a list", values)
    for index, value in enumerate(values):
        if type(value) is not kind:
            raise ObjectError(f"{_join(path, key)}[{index}]", _EXPECTED[kind], value)
    return values


def text_of(raw: Mapping[str, Any], key: str, path: str) -> str:
    """A string field, empty where it is missing."""
    return member(raw, key, str, path) or ""


def ip_of(text: str, path: str) -> str:
    """An IP address in its one canonical form.

    Raises:
        ObjectError: the text is none.
    """
    family = socket.AF_INET6 if ":" in text else socket.AF_INET
    try:
        return socket.inet_ntop(family, socket.inet_pton(family, text))
    except (OSError, ValueError) as error:
        raise ObjectError(path, "an IP address", text) from error


def port_of(raw: Mapping[str, Any], key: str, path: str) -> int:
    """A port number, 0 where it is missing.

    Raises:
        ObjectError: it is no number from 0 to 65535.
    """
    number = member(raw, key, int, path) or 0
    if not 0 <= number <= 0xFFFF:
        raise ObjectError(_join(path, key), "a port number from 1 to 65535", number)
    return number


def protocol_of(raw: Mapping[str, Any], path: str) -> Protocol:
    """The field `protocol`, TCP where it is missing.

    Raises:
        ObjectError: it is none of those that a Service can have.
    """
    text = text_of(raw, "protocol", path)
    found = _PROTOCOLS.get(text)
    if found is None:
        raise ObjectError(_join(path, "protocol"), "TCP, UDP or SCTP", text)
    return found


def time_of(raw: Mapping[str, Any], key: str, path: str) -> int:
    """A time as seconds since the epoch, `NEWEST` where it is missing.

    Raises:
        ObjectError: it is no RFC 3339 time.
    """
    text = text_of(raw, key, path)
    if not text:
        return NEWEST
    try:
        moment = datetime.fromisoformat(text)
        return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())
    except (ValueError, OverflowError) as error:
        raise ObjectError(_join(path, key), "a time as 2006-01-02T15:04:05Z", text) from error


def instant_of(text: object) -> int:
    """An RFC 3339 time as nanoseconds since the epoch, to the microsecond; 0 for anything else.

    For annotations, which anybody may write: a wrong one is as good as none.
    """
    try:
        moment = datetime.fromisoformat(text if isinstance(text, str) else "")
        return max(0, (moment - _EPOCH) // timedelta(microseconds=1) * 1000) if moment.tzinfo else 0
    except (ValueError, OverflowError):
        return 0
