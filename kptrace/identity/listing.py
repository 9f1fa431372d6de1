# SPDX-License-Identifier: Apache-2.0
"""The objects of a list's body, one by one while it arrives: a list from the server's cache comes as one, of any size."""

import re
from collections.abc import Iterable, Iterator

import msgspec

from kptrace.identity.api import ApiError

# What is within a string has backslashes before its quotes, so neither of these is found there.
_BEGIN = re.compile(rb'"items"\s*:\s*\[')
#: Where one object may end and the next begin: the API server writes the metadata first. A nested list of objects with
#: metadata looks the same, so what is before it has to be an object.
_BOUNDARY = re.compile(rb'\}\s*,\s*(?=\{\s*"(?:metadata|kind|apiVersion)")')
#: The pattern may begin in one chunk and end in the next.
_OVERLAP = 256


class _Metadata(msgspec.Struct, frozen=True, rename="camel"):
    resource_version: str | None = None
    continue_: str | None = msgspec.field(default=None, name="continue")


class _List(msgspec.Struct, frozen=True):
    metadata: _Metadata | None = None
    items: list[msgspec.Raw] | None = None


class ListReader:
    """Reads one list.

    Attributes:
        version: the list's, known when all objects were read.
        more: what to continue with for the next page; empty on the last.
    """

    def __init__(self, chunks: Iterable[bytes], path: str) -> None:
        """Read the chunks of a body; errors name the path."""
        self._chunks = iter(chunks)
        self._path = path
        self.version = ""
        self.more = ""

    def items(self) -> Iterator[bytes | msgspec.Raw]:
        """The JSON of each object.

        Raises:
            ApiError: the body is no list.
        """
        head, buffer = self._head()
        searched = 0
        while True:
            begin = 0
            for match in _BOUNDARY.finditer(buffer, searched):
                item = buffer[begin : match.start() + 1]
                if _complete(item):
                    yield item
                    begin = match.end()
            buffer = buffer[begin:]
            searched = max(0, len(buffer) - _OVERLAP)
            chunk = next(self._chunks, None)
            if chunk is None:
                break
            buffer += chunk
        rest = self._decode(head + buffer)
        yield from rest.items or ()
        metadata = rest.metadata or _Metadata()
        self.version, self.more = metadata.resource_version or "0", metadata.continue_ or ""

    def _head(self) -> tuple[bytes, bytes]:
        """What comes before the first object, and what came after it so far."""
        buffer = b""
        for chunk in self._chunks:
            buffer += chunk
            if match := _BEGIN.search(buffer):
                return buffer[: match.end()], buffer[match.end() :]
        return buffer, b""  # null, or no items at all

    def _decode(self, data: bytes) -> _List:
        try:
            return msgspec.json.decode(data, type=_List)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ApiError("malformed_stream", f"{self._path}: no list") from error


def _complete(data: bytes) -> bool:
    """Whether this is one JSON value."""
    try:
        msgspec.json.decode(data, type=msgspec.Raw)
    except msgspec.DecodeError:
        return False
    return True
