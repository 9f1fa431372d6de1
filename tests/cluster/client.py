# SPDX-License-Identifier: Apache-2.0
"""A small client of the API server for tests: plain objects over kept connections, many at a time.

It shares no code with kptrace's own client, so that a mistake there is not made twice.
"""

import contextlib
import http.client
import json
import ssl
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote, urlencode

from tests.cluster.certificates import KeyPair

Object = dict[str, Any]

#: Beyond this many connections the API server's two cores are the limit, not the waiting for its answers.
_WORKERS = 12
_TIMEOUT_SECONDS = 30.0
_DELETED_AT_A_TIME = 500
_CLOSED = (ConnectionResetError, BrokenPipeError, ssl.SSLEOFError, ssl.SSLZeroReturnError)
_PLURALS = {"EndpointSlice": "endpointslices", "Ingress": "ingresses", "ServiceCIDR": "servicecidrs"}
_CLUSTER_KINDS = ("ClusterRole", "ClusterRoleBinding", "Namespace", "Node")


class StatusError(Exception):
    """The API server refused.

    Attributes:
        code: HTTP status.
    """

    def __init__(self, code: int, method: str, path: str, message: str) -> None:
        super().__init__(f"{code} for {method} {path}: {message}")
        self.code = code


def collection(api_version: str, kind: str, namespace: str = "") -> str:
    """The path of all objects of a kind, of one namespace or of all."""
    root = "/api" if "/" not in api_version else "/apis"
    within = f"/namespaces/{namespace}" if namespace and kind not in _CLUSTER_KINDS else ""
    return f"{root}/{api_version}{within}/{_PLURALS.get(kind, kind.lower() + 's')}"


def path_of(obj: Object) -> str:
    """The path of one object."""
    metadata = obj["metadata"]
    parent = collection(obj["apiVersion"], obj["kind"], metadata.get("namespace", ""))
    return f"{parent}/{quote(metadata['name'])}"


def _parent_of(obj: Object) -> str:
    return path_of(obj).rpartition("/")[0]


def _exchange(
    connection: http.client.HTTPSConnection,
    method: str,
    target: str,
    data: bytes | None,
    headers: dict[str, str],
) -> tuple[int, bytes]:
    connection.request(method, target, data, headers)
    response = connection.getresponse()
    return response.status, response.read()


class Client:
    """Requests as one user, from any thread; a context manager that closes all connections."""

    def __init__(self, port: int, authority: Path, *, pair: KeyPair | None = None, token: str = "") -> None:
        """Ask the API server at this port of the loopback address, by a client certificate or a token."""
        self._port = port
        self._tls = ssl.create_default_context(cafile=str(authority))
        if pair is not None:
            self._tls.load_cert_chain(pair.certificate, pair.key)
        self._headers = {"Accept": "application/json", "User-Agent": "kptrace-test"}
        if token:
            self._headers["Authorization"] = f"Bearer {token}"
        self._kept = threading.local()
        self._lock = threading.Lock()
        self._connections: list[http.client.HTTPSConnection] = []
        self._pool = ThreadPoolExecutor(_WORKERS, thread_name_prefix="client")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the threads and connections. Idempotent."""
        self._pool.shutdown()
        with self._lock:
            while self._connections:
                self._connections.pop().close()

    def request(
        self, method: str, path: str, body: Object | None = None, query: Mapping[str, str] | None = None
    ) -> Object:
        """Ask once and return what came.

        Raises:
            StatusError: the answer is no success.
            OSError: there is no answer.
        """
        status, text = self.raw(method, path, body, query)
        answer: Object = (
            json.loads(text) if text.startswith(b"{") else {"message": text.decode(errors="replace")}
        )
        if status >= 300:
            raise StatusError(status, method, path, answer.get("message", ""))
        return answer

    def raw(
        self, method: str, path: str, body: Object | None = None, query: Mapping[str, str] | None = None
    ) -> tuple[int, bytes]:
        """Ask once and return the status and the body as they are.

        Raises:
            OSError: there is no answer.
        """
        target = f"{path}?{urlencode(query)}" if query else path
        data = None if body is None else json.dumps(body, separators=(",", ":")).encode()
        headers = self._headers if data is None else {**self._headers, "Content-Type": "application/json"}
        connection = self._connection()
        try:
            if connection.sock is not None:
                # The server closes connections that were idle for long; then this request has not reached it.
                with contextlib.suppress(*_CLOSED):
                    return _exchange(connection, method, target, data, headers)
                connection.close()
            return _exchange(connection, method, target, data, headers)
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise ConnectionError(f"{method} {path}: {error!r}") from error

    def _connection(self) -> http.client.HTTPSConnection:
        kept: http.client.HTTPSConnection | None = getattr(self._kept, "connection", None)
        if kept is None:
            kept = http.client.HTTPSConnection(
                "127.0.0.1", self._port, timeout=_TIMEOUT_SECONDS, context=self._tls
            )
            self._kept.connection = kept
            with self._lock:
                self._connections.append(kept)
        return kept

    def create(self, obj: Object) -> Object:
        """Create an object and return it as the server keeps it; unknown fields are refused."""
        return self.request("POST", _parent_of(obj), obj, {"fieldValidation": "Strict"})

    def replace(self, obj: Object) -> Object:
        """Replace an object, whatever its version is now unless it says which."""
        return self.request("PUT", path_of(obj), obj)

    def set_status(self, obj: Object, status: Object) -> Object:
        """Replace the status of an object, which the writing of the object itself never touches."""
        return self.request("PUT", f"{path_of(obj)}/status", {**obj, "status": status})

    def get(self, obj: Object) -> Object:
        """What the server has under the name of this object."""
        return self.request("GET", path_of(obj))

    def all_of(self, api_version: str, kind: str, namespace: str = "") -> list[Object]:
        """All objects of a kind."""
        items: list[Object] = self.request("GET", collection(api_version, kind, namespace))["items"]
        return items

    def delete(self, obj: Object) -> None:
        """Remove an object."""
        self.request("DELETE", path_of(obj))

    def delete_all(self, api_version: str, kind: str, namespace: str) -> None:
        """Remove all objects of a kind in a namespace, some at a time: thousands take longer than one request may."""
        query = {"gracePeriodSeconds": "0", "limit": str(_DELETED_AT_A_TIME)}
        while self.request("DELETE", collection(api_version, kind, namespace), query=query).get("items"):
            continue

    def create_all(self, objects: Iterable[Object]) -> list[Object]:
        """Create objects, many at a time and begun in this order; returns them in it."""
        return self.many(self.create, objects)

    def many(self, function: Callable[[Object], Object], objects: Iterable[Object]) -> list[Object]:
        """Do one thing with many objects, each on one of the kept connections; the first error is raised."""
        return list(self._pool.map(function, objects))
