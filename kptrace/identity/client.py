# SPDX-License-Identifier: Apache-2.0
"""The API server by the configuration of the `kubernetes` client: in the cluster, or by a kubeconfig.

Only its configuration and its HTTP pool are used: its models turn every object into dozens. It is imported with the
first request, on the watches' threads.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlencode

from kptrace import __version__
from kptrace.identity.api import ApiError

USER_AGENT = f"kptrace/{__version__}"

_CONNECT_TIMEOUT = 10.0
_CHUNK_BYTES = 65536


class KubernetesApi:
    """GETs to the API server, from any thread."""

    def __init__(self, kubeconfig: Path | None = None, *, environ: Mapping[str, str] = os.environ) -> None:
        """Use this kubeconfig; without one the cluster's own (in a pod), else the default kubeconfig."""
        self._kubeconfig = kubeconfig
        self._environ = environ
        self._setup = threading.Lock()
        self._lock = threading.Lock()
        self._client: tuple[Any, Any] | None = None
        self._open: set[_Response] = set()
        self._closed = False

    def get(self, path: str, query: Mapping[str, str], *, read_timeout: float) -> "_Response":
        """Ask for one path. Redirects are not followed, and nothing is tried twice: the watch does that.

        Raises:
            ApiError: there is no usable configuration, or no answer.
        """
        host, token, pool = self._prepare()
        import urllib3  # noqa: PLC0415 - with the client, not before

        headers = {"User-Agent": USER_AGENT, "Accept": "application/json"}
        if token:
            headers["Authorization"] = token
        with _network_errors(path):
            raw = pool.request(
                "GET",
                f"{host}{path}?{urlencode(query)}",
                headers=headers,
                timeout=urllib3.Timeout(connect=_CONNECT_TIMEOUT, read=read_timeout),
                preload_content=False,
                retries=False,
                redirect=False,
            )
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
            client, self._client = self._client, None
        if client is not None:
            client[1].clear()

    def _forget(self, response: "_Response") -> None:
        with self._lock:
            self._open.discard(response)

    def _prepare(self) -> tuple[str, str, Any]:
        """The server's URL, the credentials of the moment (they may be rotated), and the connections."""
        with self._setup:
            try:
                configuration, pool = self._client or self._connect()
                # The first is the name in new releases of the client, the second in old ones.
                names = ("BearerToken", "authorization")
                tokens = (configuration.get_api_key_with_prefix(name) for name in names)
                token = next(filter(None, tokens), "")
            except Exception as error:  # the client lets the errors of a dozen libraries and its own through
                text = " ".join(str(error).split())[:200]
                raise ApiError("no_configuration", f"no usable Kubernetes configuration: {text}") from error
            with self._lock:
                if self._closed:
                    raise ApiError("disconnected", "closed")
                self._client = configuration, pool
            return configuration.host, token, pool

    def _connect(self) -> tuple[Any, Any]:
        from kubernetes import client, config  # noqa: PLC0415 - tens of megabytes, only where there is an API server
        from kubernetes.client.rest import RESTClientObject  # noqa: PLC0415

        configuration, load = client.Configuration(), cast("Any", config)
        if self._kubeconfig is None and "KUBERNETES_SERVICE_HOST" in self._environ:
            load.load_incluster_config(client_configuration=configuration)
        else:
            where = str(self._kubeconfig) if self._kubeconfig else None
            load.load_kube_config(config_file=where, client_configuration=configuration)
        return configuration, RESTClientObject(configuration).pool_manager


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
