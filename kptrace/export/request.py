# SPDX-License-Identifier: Apache-2.0
"""The head of an HTTP request: as strict and as bounded as a metrics server can afford to be. Pure."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from urllib.parse import parse_qsl, urlsplit

MAX_LINE = 4096
MAX_HEAD = 16384
MAX_HEADERS = 64
MAX_FIELDS = 16
END = b"\r\n\r\n"

_LINE = re.compile(r"([A-Z]+) ([!-~]+) HTTP/([0-9])\.([0-9])")
_HEADER = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\x00-\x08\x0a-\x1f\x7f]*?)[ \t]*")


class BadRequestError(Exception):
    """A request that is answered with `status` and nothing else; the connection ends."""

    def __init__(self, status: HTTPStatus) -> None:
        super().__init__(status.phrase)
        self.status = status


@dataclass(frozen=True, slots=True)
class Request:
    """One request without a body.

    Attributes:
        method: as sent: `GET`.
        path: of the target, not decoded.
        query: the last value of each field.
        headers: by name in lower case; repeated ones joined by commas.
        keep_alive: whether the client wants to send another one.
    """

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    keep_alive: bool

    @property
    def wants_html(self) -> bool:
        """Whether it is a person's browser that asks; `?format=json` or `?format=html` decide."""
        wanted = self.query.get("format")
        return (
            wanted == "html" if wanted in ("html", "json") else "text/html" in self.headers.get("accept", "")
        )


def check_size(head: bytes | bytearray) -> None:
    """Check what has arrived of a head so far.

    Raises:
        BadRequestError: it is too long already.
    """
    end = head.find(b"\r\n")
    if (end < 0 and len(head) > MAX_LINE) or end > MAX_LINE:
        raise BadRequestError(HTTPStatus.REQUEST_URI_TOO_LONG)
    end = head.find(END)
    if (end < 0 and len(head) > MAX_HEAD) or end > MAX_HEAD:
        raise BadRequestError(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)


def parse(head: bytes) -> Request:
    """Parse a head without its final empty line.

    Raises:
        BadRequestError: it is no HTTP/1 request, or has a body.
    """
    line, *rest = head.decode("latin-1").split("\r\n")
    match = _LINE.fullmatch(line)
    if match is None:
        raise BadRequestError(HTTPStatus.BAD_REQUEST)
    method, target, major, minor = match.groups()
    if major != "1":
        raise BadRequestError(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED)
    headers = _headers(rest)
    if "transfer-encoding" in headers or headers.get("content-length", "0") != "0":
        raise BadRequestError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
    modern = minor != "0"
    if modern and "host" not in headers:
        raise BadRequestError(HTTPStatus.BAD_REQUEST)
    path, query = _target(target)
    options = {each.strip() for each in headers.get("connection", "").lower().split(",")}
    return Request(method, path, query, headers, modern and "close" not in options)


def _headers(lines: list[str]) -> dict[str, str]:
    if len(lines) > MAX_HEADERS:
        raise BadRequestError(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
    headers: dict[str, str] = {}
    for line in lines:
        match = _HEADER.fullmatch(line)
        if match is None:
            raise BadRequestError(HTTPStatus.BAD_REQUEST)
        name = match[1].lower()
        headers[name] = f"{headers[name]}, {match[2]}" if name in headers else match[2]
    return headers


def _target(target: str) -> tuple[str, dict[str, str]]:
    if target.startswith("/"):
        path, _, query = target.partition("?")
    else:
        try:
            parts = urlsplit(target)
        except ValueError as error:
            raise BadRequestError(HTTPStatus.BAD_REQUEST) from error
        if parts.scheme not in ("http", "https"):
            raise BadRequestError(HTTPStatus.BAD_REQUEST)
        path, query = parts.path or "/", parts.query
    try:
        return path, dict(parse_qsl(query, max_num_fields=MAX_FIELDS))
    except ValueError as error:
        raise BadRequestError(HTTPStatus.BAD_REQUEST) from error
