# SPDX-License-Identifier: Apache-2.0
"""An HTTP response as bytes. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from email.utils import formatdate
from http import HTTPStatus
from types import MappingProxyType

from kptrace.export.page import STYLE_SOURCE

TEXT = "text/plain; charset=utf-8"
HTML = "text/html; charset=utf-8"
JSON = "application/json"

#: Of every response: nothing is loaded, run, framed or kept.
_ALWAYS = {
    "Content-Security-Policy": f"default-src 'none'; style-src {STYLE_SOURCE}; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


@dataclass(frozen=True, slots=True)
class Response:
    """Status, body and what describes the body."""

    status: HTTPStatus
    body: bytes
    content_type: str = TEXT
    headers: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    @classmethod
    def plain(cls, status: HTTPStatus, text: str = "", **headers: str) -> "Response":
        """A line of text; without one the status speaks for itself. `Retry_After` is the header Retry-After."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return cls(status, f"{text or status.phrase}\n".encode("utf-8", "replace"), TEXT, named)

    def encode(self, *, now: float, body: bool, keep_alive: bool) -> bytes:
        """The bytes to send.

        Args:
            now: seconds since the epoch, for the Date header.
            body: False for the answer to HEAD.
            keep_alive: whether the connection stays open.
        """
        headers = {
            "Date": formatdate(now, usegmt=True),
            "Content-Type": self.content_type,
            "Content-Length": str(len(self.body)),
            **_ALWAYS,
            **self.headers,
        }
        if not keep_alive:
            headers["Connection"] = "close"
        lines = [f"HTTP/1.1 {self.status.value} {self.status.phrase}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        return "\r\n".join([*lines, "", ""]).encode("latin-1", "replace") + (self.body if body else b"")
