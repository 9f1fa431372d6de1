# SPDX-License-Identifier: Apache-2.0
"""Many nodes' watches without the nodes: kptrace's own requests, whose answers are read and thrown away.

Usage: replay.py PORT CA_FILE TOKEN_FILE WATCHES, with WATCHES as Service watches : EndpointSlice watches. Each line on stdin
is answered by a line of JSON: bytes read, whether all watches have had the objects that there were, how many ended, and how
many requests were refused at first.
"""

import json
import random
import selectors
import socket
import ssl
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from urllib.parse import urlencode

from kptrace.identity.api import ApiError, Response
from kptrace.identity.client import USER_AGENT
from kptrace.identity.resources import Level, Resource, resources
from kptrace.identity.watch import Cursor, Tools, list_then_watch

_READ_BYTES = 1 << 18
_AT_ONCE = 4
_END = b"k8s.io/initial-events-end"


class _Asked(Exception):
    """What kptrace would ask."""


class _Recorder:
    """An API server that only notes the request."""

    def get(self, path: str, query: Mapping[str, str], *, read_timeout: float) -> Response:
        """Refuse, and say what was asked."""
        raise _Asked(f"{path}?{urlencode(query)}")


def request_of(resource: Resource) -> str:
    """The path and query that kptrace begins to watch a resource with."""
    tools = Tools(lambda: 0.0, lambda _: False, random.Random())
    try:
        for _ in list_then_watch(_Recorder(), resource, Cursor(), tools):
            raise ApiError("internal", "no answer was given")
    except _Asked as asked:
        return str(asked)
    raise ApiError("internal", "nothing was asked")


class _Refused(Exception):
    """The server asks to come again later (429)."""


class _Watch:
    """One watch: how much came, and whether the end of what there was is among it."""

    def __init__(self, port: int, context: ssl.SSLContext, token: str, target: str) -> None:
        plain = socket.create_connection(("127.0.0.1", port))
        self.target = target
        self.socket = context.wrap_socket(plain, server_hostname="127.0.0.1")
        head = (
            f"GET {target} HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: application/json\r\n"
            f"User-Agent: {USER_AGENT}\r\nAuthorization: Bearer {token}\r\n\r\n"
        )
        self.socket.sendall(head.encode())
        self.socket.setblocking(False)
        self.bytes = 0
        self.complete = False
        self._tail = b""

    def read(self) -> bool:
        """Take what there is; whether more may come."""
        while True:
            try:
                data = self.socket.recv(_READ_BYTES)
            except ssl.SSLWantReadError:
                return True
            if not data:
                return False
            if not self.bytes and data.startswith(b"HTTP/1.1 429"):
                raise _Refused
            if not self.bytes and not data.startswith(b"HTTP/1.1 200"):
                raise ConnectionError(data[:300].decode(errors="replace"))
            self.bytes += len(data)
            self.complete = self.complete or _END in self._tail + data
            self._tail = data[-len(_END) :]


class _Watches:
    """All of them; few begin at a time, as with the random delay of the nodes' starts."""

    def __init__(self, open_: Callable[[str], _Watch], targets: list[str]) -> None:
        self.selector = selectors.DefaultSelector()
        self.refused = self.ended = 0
        self._open = open_
        self._waiting = targets
        self._opened: list[_Watch] = []
        self._not_before = 0.0

    def begin(self) -> None:
        """Open what may be opened now."""
        while self._waiting and time.monotonic() >= self._not_before and self._beginning() < _AT_ONCE:
            watch = self._open(self._waiting.pop())
            self.selector.register(watch.socket, selectors.EVENT_READ, watch)
            self._opened.append(watch)

    def read(self, watch: _Watch) -> None:
        """Take what one has."""
        try:
            if watch.read():
                return
            self.ended += 1
        except _Refused:
            self.refused += 1
            self._opened.remove(watch)
            self._waiting.append(watch.target)
            self._not_before = time.monotonic() + 1.0  # what it says itself in Retry-After
        self.selector.unregister(watch.socket)
        watch.socket.close()

    def _beginning(self) -> int:
        return sum(not watch.complete for watch in self._opened)

    def answer(self) -> str:
        """What is asked for."""
        complete = not self._waiting and not self._beginning()
        total = sum(watch.bytes for watch in self._opened)
        return json.dumps(
            {"bytes": total, "complete": complete, "ended": self.ended, "refused": self.refused}
        )


def main() -> None:
    """Watch until stdin ends."""
    port, authority, token, counts = sys.argv[1:]
    context = ssl.create_default_context(cafile=authority)
    secret = Path(token).read_text(encoding="ascii")
    wanted = resources(Level.SERVICES, endpoint_slices=True)
    targets = [
        request_of(resource)
        for resource, count in zip(wanted, map(int, counts.split(":")), strict=True)
        for _ in range(count)
    ]
    watches = _Watches(partial(_Watch, int(port), context, secret), targets)
    watches.selector.register(sys.stdin, selectors.EVENT_READ)
    while True:
        watches.begin()
        for key, _ in watches.selector.select(0.2):
            if key.data is not None:
                watches.read(key.data)
            elif sys.stdin.readline():
                print(watches.answer(), flush=True)
            else:
                return


if __name__ == "__main__":
    main()
