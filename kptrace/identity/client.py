# SPDX-License-Identifier: Apache-2.0
"""GETs to the API server over urllib3: its errors, who waits for an answer, and credentials that change."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from kptrace import __version__
from kptrace.identity.api import ApiError
from kptrace.identity.connections import ACCOUNT, Connection, connect, unusable

USER_AGENT = f"kptrace/{__version__}"

_CONNECT_TIMEOUT = 10.0
_CHUNK_BYTES = 65536
_UNAUTHORIZED = 401


class KubernetesApi:
    """GETs to the API server, from any thread."""

    def __init__(
        self,
        kubeconfig: Path | None = None,
        *,
        environ: Mapping[str, str] = os.environ,
        account: Path = ACCOUNT,
    ) -> None:
        """Use this kubeconfig; without one the cluster's own (in a pod), else the default kubeconfig."""
        self._where = partial(connect, kubeconfig, environ=environ, account=account)
        self._setup = threading.Lock()
        self._lock = threading.Lock()
        self._connection: Connection | None = None
        self._open: set[_Response] = set()
        self._closed = False

    def get(self, path: str, query: Mapping[str, str], *, read_timeout: float) -> "_Response":
        """Ask for one path. Redirects are not followed, and nothing is tried twice: the watch does that.

        Raises:
            ApiError: there is no usable configuration, or no answer.
        """
        connection, token = self._prepare()
        import urllib3  # noqa: PLC0415 - with the client, not before

        headers = {"User-Agent": USER_AGENT, "Accept": "application/json"}
        if token:
            headers["Authorization"] = token
        with self._renewed_after_tls(connection), _network_errors(path):
            raw = connection.pool.request(
                "GET",
                f"{connection.host}{path}?{urlencode(query)}",
                headers=headers,
                timeout=urllib3.Timeout(connect=_CONNECT_TIMEOUT, read=read_timeout),
                preload_content=False,
                retries=False,
                redirect=False,
            )
        if raw.status == _UNAUTHORIZED:
            # Credentials that a kubeconfig names may have been replaced: the next request reads it anew.
            self._renew(connection)
        response = _Response(raw, path, self._forget)
        with self._lock:
            self._open.add(response)
            if self._closed:
                response.abort()
        return response

    def close(self) -> None:
        """End all reads that wait for the server, and refuse new requests. Idempotent."""
        with self._lock:
            self._closed = True
            for response in self._open:
                response.abort()
            connection, self._connection = self._connection, None
        if connection is not None:
            connection.pool.clear()

    def _forget(self, response: "_Response") -> None:
        with self._lock:
            self._open.discard(response)

    def _prepare(self) -> tuple[Connection, str]:
        """The server, and the credentials of the moment."""
        with self._setup:
            connection = self._connection or self._where()
            try:
                token = connection.authorization()
            except Exception as error:  # as those of connecting
                raise unusable(error) from error
            with self._lock:
                if self._closed:
                    raise ApiError("disconnected", "closed")
                self._connection = connection
            return connection, token

    def _renew(self, connection: Connection) -> None:
        """Read the configuration anew for the next request; requests that run go on."""
        with self._lock:
            if self._connection is connection:
                self._connection = None

    @contextlib.contextmanager
    def _renewed_after_tls(self, connection: Connection) -> Iterator[None]:
        """A cluster's authority is replaced now and then."""
        try:
            yield
        except ApiError as error:
            if error.reason == "tls":
                self._renew(connection)
            raise


class _Response:
    """One answer of urllib3."""

    def __init__(self, raw: Any, path: str, done: "Callable[[_Response], None]") -> None:
        self._raw = raw
        self._path = path
        self._done = done
        self.status: int = raw.status

    @property
    def retry_after(self) -> float:
        """Seconds of the header Retry-After, 0 without (or with a date, which the API server never sends)."""
        text = self._raw.headers.get("Retry-After", "")
        return min(float(text), 600.0) if text.isascii() and text.isdigit() else 0.0

    def body(self) -> bytes:
        """All of it."""
        with _network_errors(self._path):
            data: bytes = self._raw.data
            return data

    def chunks(self) -> Iterator[bytes]:
        """What arrives, as it arrives."""
        with _network_errors(self._path):
            yield from self._raw.stream(_CHUNK_BYTES, decode_content=True)

    def close(self) -> None:
        """Close for good: what is left of a watch must not reach the next request on this connection."""
        self._done(self)
        self._raw.close()

    def abort(self) -> None:
        """Make a read on another thread return. Older versions of urllib3 cannot: that read ends by its timeout."""
        shutdown = getattr(self._raw, "shutdown", None)
        if shutdown is not None:
            # ValueError: the other thread has closed it already; OSError: the server has.
            with contextlib.suppress(OSError, ValueError, RuntimeError):
                shutdown()


@contextlib.contextmanager
def _network_errors(path: str) -> Iterator[None]:
    """Everything that the network does to urllib3, as `ApiError`."""
    from urllib3 import exceptions  # noqa: PLC0415 - with the client, not before

    try:
        yield
    except exceptions.SSLError as error:
        raise ApiError("tls", f"{path}: {_short(error)}") from error
    except (exceptions.NewConnectionError, exceptions.ConnectTimeoutError) as error:
        raise ApiError("unreachable", f"{path}: {_short(error)}") from error
    except exceptions.ReadTimeoutError as error:
        raise ApiError("timeout", f"{path}: {_short(error)}") from error
    except (exceptions.ProtocolError, OSError) as error:
        raise ApiError("disconnected", f"{path}: {_short(error)}") from error
    except exceptions.HTTPError as error:
        raise ApiError("unreachable", f"{path}: {_short(error)}") from error


def _short(error: Exception) -> str:
    """What went wrong, without the memory address that urllib3 puts first."""
    text = " ".join(str(error).split())
    return (text.partition(">: ")[2] or text)[:200]
