# SPDX-License-Identifier: Apache-2.0
"""From JSON, or from what YAML gave, to the structures of `identity.wire`; what does not fit is named by its path."""

import re
from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar

import msgspec

from kptrace.identity.fields import ObjectError
from kptrace.identity.wire import Wire

T = TypeVar("T", bound=Wire)

_EXPECTED = {
    "object": "a mapping",
    "array": "a list",
    "str": "a string",
    "int": "an integer",
    "bool": "true or false",
}
_MESSAGE = re.compile(r"Expected `(\w+)[^`]*`.*?(?: - at (?:`key` in )?`\$\.?([^`]*)`)?")
_STEP = re.compile(r"(\w[^.\[\]]*)|\[(\d+)\]")


def from_bytes(data: bytes | msgspec.Raw, kind: type[T]) -> T:
    """Decode one object.

    Raises:
        ObjectError: a field is of the wrong type.
        msgspec.DecodeError, UnicodeDecodeError: the bytes are no JSON.
    """
    try:
        found: T = _decoder(kind).decode(data)
    except msgspec.ValidationError as error:
        raise _object_error(error, msgspec.json.decode(data)) from error
    return found


def from_mapping(raw: Mapping[str, Any], kind: type[T]) -> T:
    """The same of an object that is decoded already.

    Raises:
        ObjectError: a field is of the wrong type.
    """
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        raise _object_error(error, raw) from error


@cache
def _decoder(kind: type[T]) -> "msgspec.json.Decoder[T]":
    return msgspec.json.Decoder(kind)


def _object_error(error: msgspec.ValidationError, raw: Any) -> ObjectError:
    """The same error with the value that is there. msgspec says where by `$.spec.ports[0].port`."""
    text = str(error)
    match = _MESSAGE.fullmatch(text)
    if match is None:
        return ObjectError("", f"something else ({text})", None)
    path, value = match[2] or "", raw
    for name, index in _STEP.findall(path):
        try:
            value = value[name] if name else value[int(index)]
        except (LookupError, TypeError):  # a label: its name has dots of its own
            return ObjectError(path, _EXPECTED.get(match[1], match[1]), None)
    return ObjectError(path, _EXPECTED.get(match[1], match[1]), value)
