# SPDX-License-Identifier: Apache-2.0
"""One client's connection: request after request, each within its time and size."""

import socket
import time
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus

import structlog

from kptrace.export.request import END, BadRequestError, Request, check_size, parse
from kptrace.export.response import Response
from kptrace.export.tls import RenewedTls

_CHUNK = 16384
#: How much of a refused request is read, so that the refusal arrives before the connection ends.
_LINGER_BYTES = 1 << 20
_LINGER_SECONDS = 1.0


class Connection:
    """Runs in a thread of its own; `interrupt` and `let_go` may be called from others."""

    def __init__(
        self,
        sock: socket.socket,
        answer: Callable[[Request], Response],
        tls: RenewedTls | None,
        timeout: float,
    ) -> None:
        """Own the accepted socket. `timeout` is seconds: to begin a request, to send its head, to take the answer."""
        self._sock = sock
        self._answer = answer
        self._tls = tls
        self._timeout = timeout
        self._ending = False
        #: Monotonic seconds since when the client owes a request; None while it is answered.
        self.waiting_since: float | None = time.monotonic()

    def run(self) -> None:
        """Serve until the client ends, is too slow or sends what is no request."""
        try:
            self._handshake()
            self._serve()
        except OSError as error:  # of the network, a time-out, or TLS: the client's business
            structlog.get_logger().debug("connection_failed", error=str(error))
        finally:
            self._sock.close()

    def interrupt(self) -> None:
        """End at once."""
        self._ending = True
        self._shutdown(socket.SHUT_RDWR)

    def let_go(self) -> None:
        """End after the answer that is being made."""
        self._ending = True
        self._shutdown(socket.SHUT_RD)

    def _handshake(self) -> None:
        self._sock.settimeout(self._timeout)
        if self._tls is not None:
            # In this thread: a slow handshake keeps nobody else waiting.
            secure = self._tls.current().wrap_socket(
                self._sock, server_side=True, do_handshake_on_connect=False
            )
            self._sock = secure
            if not self._ending:
                secure.do_handshake()

    def _serve(self) -> None:
        buffer = bytearray()
        while not self._ending:
            self.waiting_since = time.monotonic()
            try:
                head = self._read_head(buffer)
                if head is None:
                    return
                request = parse(head)
            except BadRequestError as error:
                self._refuse(error.status)
                return
            self.waiting_since = None
            response = self._answer(request)
            keep_alive = request.keep_alive and not self._ending
            self._send(response.encode(now=time.time(), body=request.method != "HEAD", keep_alive=keep_alive))
            if not keep_alive:
                return

    def _read_head(self, buffer: bytearray) -> bytes | None:
        """The next head, cut off the buffer; None if the client is gone or began nothing in time."""
        self._sock.settimeout(self._timeout)
        deadline = time.monotonic() + self._timeout if buffer else None
        while END not in buffer:
            check_size(buffer)
            if deadline is not None and not self._until(deadline):
                raise BadRequestError(HTTPStatus.REQUEST_TIMEOUT)
            try:
                chunk = self._sock.recv(_CHUNK)
            except TimeoutError as error:
                if not buffer:
                    return None
                raise BadRequestError(HTTPStatus.REQUEST_TIMEOUT) from error
            if not chunk:
                return None
            deadline = deadline or time.monotonic() + self._timeout
            buffer += chunk
        check_size(buffer)
        end = buffer.find(END)
        head = bytes(buffer[:end])
        del buffer[: end + len(END)]
        return head

    def _until(self, deadline: float) -> bool:
        """Let the socket wait no longer than this; False if it is over already."""
        left = deadline - time.monotonic()
        if left > 0:
            self._sock.settimeout(left)
        return left > 0

    def _send(self, content: bytes) -> None:
        # sendall of a TLS socket grants every record its own time.
        deadline = time.monotonic() + self._timeout
        rest = memoryview(content)
        while rest:
            if not self._until(deadline):
                raise TimeoutError("the client does not take its answer")
            rest = rest[self._sock.send(rest[:_CHUNK]) :]

    def _refuse(self, status: HTTPStatus) -> None:
        self._send(Response.plain(status).encode(now=time.time(), body=True, keep_alive=False))
        # Closing with bytes unread resets the connection, and the client would not see the refusal.
        self._shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + min(_LINGER_SECONDS, self._timeout)
        left = _LINGER_BYTES
        while left > 0 and self._until(deadline):
            chunk = self._sock.recv(_CHUNK)
            if not chunk:
                return
            left -= len(chunk)

    def _shutdown(self, how: int) -> None:
        with suppress(OSError):
            # Not the TLS socket's own shutdown, which would take its session from under the thread that uses it.
            socket.socket.shutdown(self._sock, how)
