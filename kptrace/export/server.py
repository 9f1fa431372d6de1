# SPDX-License-Identifier: Apache-2.0
"""The HTTP server: /metrics, /healthz, /readyz, /status. Bounded in scrapes, time and request size."""

import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import AF_INET6

import structlog

from kptrace.export.registry import Exporter
from kptrace.export.status import StatusPage
from kptrace.model.errors import ListenError

MAX_SCRAPES = 5
MAX_CONNECTIONS = 64
TIMEOUT_SECONDS = 10
_INDEX = (
    b'<!doctype html><html lang="en"><title>kptrace</title><h1>kptrace</h1><ul><li><a href="/metrics">metrics</a>'
    b'<li><a href="/status">status</a><li><a href="/healthz">healthz</a><li><a href="/readyz">readyz</a></ul></html>'
)
_SECURITY = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'",
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files of a TLS server; with `client_ca` clients must show a certificate that it signed."""

    certificate: Path
    key: Path
    client_ca: Path | None = None

    def context(self) -> ssl.SSLContext:
        """The TLS context.

        Raises:
            ListenError: a file cannot be read or used.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(self.certificate, self.key)
            if self.client_ca is not None:
                context.load_verify_locations(self.client_ca)
                context.verify_mode = ssl.CERT_REQUIRED
        except (OSError, ssl.SSLError) as error:
            files = ", ".join(str(f) for f in (self.certificate, self.key, self.client_ca) if f)
            raise ListenError(
                f"the TLS files cannot be used ({files}): {error}", remedy="give readable PEM files"
            ) from error
        return context


class MetricsServer:
    """Serves from threads of its own until `close`."""

    def __init__(
        self,
        address: tuple[str, int],
        exporter: Exporter,
        status: StatusPage,
        ready: Callable[[], bool],
        tls: TlsFiles | None = None,
    ) -> None:
        """Bind the address; nothing is served before `start`.

        Raises:
            ListenError: the address is in use or not ours, or the TLS files cannot be used.
        """
        context = tls.context() if tls else None
        try:
            self._server = _Server(address, exporter, status, ready, context)
        except OSError as error:
            host, port = address
            raise ListenError(
                f"cannot listen on {host}:{port}: {error.strerror or error}",
                remedy="choose another address with --listen, or end what listens there",
            ) from error
        self._thread = threading.Thread(target=self._server.serve_forever, name="kptrace-http", daemon=True)

    @property
    def port(self) -> int:
        """The port in use."""
        return int(self._server.server_address[1])

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def close(self) -> None:
        """Stop listening. Idempotent."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 16

    def __init__(
        self,
        address: tuple[str, int],
        exporter: Exporter,
        status: StatusPage,
        ready: Callable[[], bool],
        context: ssl.SSLContext | None,
    ) -> None:
        if ":" in address[0]:
            self.address_family = AF_INET6
        super().__init__(address, _Handler)
        self.exporter, self.status, self.ready, self.context = exporter, status, ready, context
        self.scrapes = threading.BoundedSemaphore(MAX_SCRAPES)
        self.connections = threading.BoundedSemaphore(MAX_CONNECTIONS)

    def process_request(self, request, client_address) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
        if not self.connections.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request, client_address) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
        try:
            request.settimeout(TIMEOUT_SECONDS)
            if self.context is not None:
                # Here, in the connection's own thread: a slow handshake keeps nobody else waiting.
                request = self.context.wrap_socket(request, server_side=True)
            super().process_request_thread(request, client_address)
        except (OSError, ssl.SSLError) as error:
            structlog.get_logger().info("connection_failed", error=str(error))
            self.shutdown_request(request)
        finally:
            self.connections.release()

    def handle_error(self, request, client_address) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
        structlog.get_logger().info("request_failed", client=str(client_address[0]), exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "kptrace"
    sys_version = ""
    timeout = TIMEOUT_SECONDS
    server: _Server

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        match path:
            case "/metrics":
                self._metrics()
            case "/healthz":
                self._answer(HTTPStatus.OK, b"ok\n", "text/plain")
            case "/readyz":
                ready = self.server.ready()
                code = HTTPStatus.OK if ready else HTTPStatus.SERVICE_UNAVAILABLE
                self._answer(code, b"ready\n" if ready else b"starting\n", "text/plain")
            case "/status" if "text/html" in self.headers.get("Accept", "") and "format=json" not in query:
                self._answer(HTTPStatus.OK, self.server.status.as_html(), "text/html; charset=utf-8")
            case "/status":
                self._answer(HTTPStatus.OK, self.server.status.as_json(), "application/json")
            case "/":
                self._answer(HTTPStatus.OK, _INDEX, "text/html; charset=utf-8")
            case _:
                self._answer(HTTPStatus.NOT_FOUND, b"not found\n", "text/plain")

    do_HEAD = do_GET  # noqa: N815  (the base class's name)

    def _metrics(self) -> None:
        if not self.server.scrapes.acquire(blocking=False):
            self._answer(
                HTTPStatus.SERVICE_UNAVAILABLE, b"too many scrapes\n", "text/plain", {"Retry-After": "1"}
            )
            return
        try:
            body, headers = self.server.exporter.render(
                self.headers.get("Accept", ""), self.headers.get("Accept-Encoding", "")
            )
        finally:
            self.server.scrapes.release()
        self._answer(HTTPStatus.OK, body, headers.pop("Content-Type"), headers)

    def _answer(self, code: HTTPStatus, body: bytes, kind: str, extra: dict[str, str] | None = None) -> None:
        self.send_response(code)
        headers = {"Content-Type": kind, "Content-Length": str(len(body)), **_SECURITY, **(extra or {})}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  (the base class's name)
        structlog.get_logger().debug("http_request", line=format % args)
