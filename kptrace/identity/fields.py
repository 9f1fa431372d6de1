# SPDX-License-Identifier: Apache-2.0
"""What the fields of an object must be: missing is fine, something else is an error with the field's path."""

import socket
import sys
from collections.abc import Mapping
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


def ip_of(text: str, path: str, *indices: int) -> str:
    """An IP address in its one canonical form; `path` is formatted with the indices only where it is needed.

    Raises:
        ObjectError: the text is none.
    """
    try:
        if ":" not in text:
            # It takes no other form: no leading zeros, no parts that are left out.
            socket.inet_pton(socket.AF_INET, text)
            return text
        return socket.inet_ntop(socket.AF_INET6, socket.inet_pton(socket.AF_INET6, text))
    except (OSError, ValueError) as error:
        raise ObjectError(path.format(*indices), "an IP address", text) from error


def port_of(number: int | None, path: str) -> int:
    """A port number, 0 where it is missing.

    Raises:
        ObjectError: it is no number from 0 to 65535.
    """
    if number is not None and not 0 <= number <= 0xFFFF:
        raise ObjectError(path, "a port number from 1 to 65535", number)
    return number or 0


def protocol_of(text: str | None, path: str) -> Protocol:
    """A protocol, TCP where it is missing.

    Raises:
        ObjectError: it is none of those that a Service can have.
    """
    found = _PROTOCOLS.get(text or "")
    if found is None:
        raise ObjectError(path, "TCP, UDP or SCTP", text)
    return found


def time_of(text: str | None, path: str) -> int:
    """A time as seconds since the epoch, `NEWEST` where it is missing.

    Raises:
        ObjectError: it is no RFC 3339 time.
    """
    if not text:
        return NEWEST
    try:
        moment = datetime.fromisoformat(text)
        return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())
    except (ValueError, OverflowError) as error:
        raise ObjectError(path, "a time as 2006-01-02T15:04:05Z", text) from error


def instant_of(text: object) -> int:
    """An RFC 3339 time as nanoseconds since the epoch, to the microsecond; 0 for anything else.

    For annotations, which anybody may write: a wrong one is as good as none.
    """
    try:
        moment = datetime.fromisoformat(text if isinstance(text, str) else "")
        return max(0, (moment - _EPOCH) // timedelta(microseconds=1) * 1000) if moment.tzinfo else 0
    except (ValueError, OverflowError):
        return 0
