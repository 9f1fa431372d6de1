# SPDX-License-Identifier: Apache-2.0
"""The HTTP server: /metrics, /healthz, /readyz, /status. Bounded in connections, scrapes, time and request size."""

import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from kptrace.export.connection import Connection
from kptrace.export.registry import Exporter
from kptrace.export.routes import MAX_SCRAPES, Documents, Readiness, Routes, no_documents
from kptrace.export.status import StatusPage
from kptrace.export.tls import RenewedTls, TlsFiles
from kptrace.model.errors import ListenError

__all__ = ["Limits", "MetricsServer", "TlsFiles"]
_PAUSE_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Limits:
    """What clients may take.

    Attributes:
        scrapes: rendered at a time; a further one gets 503.
        connections: open at a time; for a further one, the connection that owes a request longest is ended.
        timeout: seconds to begin a request, to send its head, and to take the answer.
        farewell: seconds that `close` waits for answers on their way.
    """

    scrapes: int = MAX_SCRAPES
    connections: int = 64
    timeout: float = 10.0
    farewell: float = 2.0


class MetricsServer:
    """Serves from daemonic threads of its own until `close`."""

    def __init__(
        self,
        listener: socket.socket,
        exporter: Exporter,
        status: StatusPage,
        ready: Callable[[], Readiness],
        tls: TlsFiles | None = None,
        limits: Limits | None = None,
        documents: Documents = no_documents,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        """Own a listening socket; nothing is served before `start`.

        Args:
            listener: see `kptrace.export.listen`.
            exporter: of /metrics.
            status: of /status.
            ready: of /readyz: whether all is attached, alone or with a line for people.
            tls: files for HTTPS; None serves HTTP.
            limits: other than the defaults.
            documents: further JSON documents by path.
            on_close: called when nobody listens any more.

        Raises:
            ListenError: the TLS files cannot be used.
        """
        self._limits = limits or Limits()
        self._routes = Routes(exporter, status, ready, self._limits.scrapes, documents)
        self._listener = listener
        self._on_close = on_close
        try:
            self._tls = RenewedTls(tls) if tls else None
        except ListenError:
            listener.close()
            raise
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._connections: dict[Connection, threading.Thread] = {}
        self._thread = threading.Thread(target=self._accept, name="kptrace-http", daemon=True)
        self._log = structlog.get_logger()

    @property
    def port(self) -> int:
        """The port in use, of a TCP listener."""
        return int(self._listener.getsockname()[1])

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def close(self) -> None:
        """Stop listening, let answers on their way arrive, end the rest. Idempotent."""
        if self._closing.is_set():
            return
        self._closing.set()
        if self._thread.is_alive():
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept
            self._thread.join()
        self._listener.close()
        self._on_close()
        with self._lock:
            left = dict(self._connections)
        for connection in left:
            connection.let_go()
        deadline = time.monotonic() + self._limits.farewell
        for connection, thread in left.items():
            thread.join(max(0.0, deadline - time.monotonic()))
            connection.interrupt()

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                client, _address = self._listener.accept()
            except OSError as error:
                if not self._closing.is_set():  # out of descriptors, or the client is gone already
                    self._log.warning("accept_failed", error=str(error))
                    self._closing.wait(_PAUSE_SECONDS)
                continue
            self._take(client)

    def _take(self, client: socket.socket) -> None:
        if not self._make_room():
            self._log.warning("connection_refused", connections=self._limits.connections)
            client.close()
            return
        connection = Connection(client, self._routes.answer, self._tls, self._limits.timeout)
        thread = threading.Thread(target=self._run, args=(connection,), name="kptrace-client", daemon=True)
        with self._lock:
            self._connections[connection] = thread
        try:
            thread.start()
        except RuntimeError as error:  # the process may have no more threads
            self._log.warning("connection_refused", error=str(error))
            client.close()
            with self._lock:
                del self._connections[connection]

    def _make_room(self) -> bool:
        """Whether another connection may be taken, at the expense of the one that owes a request longest."""
        with self._lock:
            if len(self._connections) < self._limits.connections:
                return True
            owing = [(c.waiting_since, c) for c in self._connections if c.waiting_since is not None]
            if not owing:
                return False
            slowest = min(owing, key=lambda pair: pair[0])[1]
            del self._connections[slowest]
        slowest.interrupt()
        return True

    def _run(self, connection: Connection) -> None:
        try:
            connection.run()
        finally:
            with self._lock:
                self._connections.pop(connection, None)
