# SPDX-License-Identifier: Apache-2.0
"""kube-proxy's own metrics as a part of the daemon: asked over HTTP, within the watched network namespace."""

import http.client
from urllib.parse import urlsplit

from kptrace.daemon.part import Node, Part, Running
from kptrace.daemon.settings import Settings
from kptrace.kernel.bytecode import Bytecode
from kptrace.kernel.netns import NetworkNamespace
from kptrace.model.errors import KernelError, UsageError
from kptrace.signals.kube_proxy import KubeProxySignal

_TIMEOUT_SECONDS = 5.0
#: It has some hundred kilobytes.
_MOST_BYTES = 16 << 20
_OK = 200


class Fetcher:
    """GETs to one HTTP server in a network namespace."""

    def __init__(self, netns: NetworkNamespace, url: str) -> None:
        """Ask the server of this URL.

        Raises:
            UsageError: it is no http:// URL.
        """
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            port = None
        if parts.scheme != "http" or not parts.hostname or port is None:
            raise UsageError(
                f"--kube-proxy-metrics {url!r} is no URL of kube-proxy's metrics",
                remedy="give for example http://127.0.0.1:10249",
            )
        self._netns = netns
        self._host, self._port = parts.hostname, port

    def __call__(self, path: str) -> str:
        """The text at a path.

        Raises:
            OSError: there is no answer, or another than 200.
        """
        connection = http.client.HTTPConnection(self._host, self._port, timeout=_TIMEOUT_SECONDS)
        try:
            with self._netns.enter():
                connection.connect()  # the socket stays in the namespace that it was made in
            connection.request("GET", path, headers={"Connection": "close"})
            answer = connection.getresponse()
            if answer.status != _OK:
                raise ConnectionError(f"{path} answers {answer.status}")
            return answer.read(_MOST_BYTES).decode(errors="replace")
        except (http.client.HTTPException, KernelError) as error:
            raise ConnectionError(f"{path}: {error!r}") from error
        finally:
            connection.close()


def _start(node: Node, _code: Bytecode) -> Running:
    signal = KubeProxySignal(Fetcher(node.netns, node.settings.kube_proxy_metrics), node.loop)
    node.stack.callback(signal.close)
    node.shared.synced.append(signal.synced)
    node.shared.proxy = signal.proxy
    signal.start()
    return signal


def _disabled(settings: Settings) -> str:
    return "" if settings.kube_proxy_metrics else "no --kube-proxy-metrics"


#: After the sync signal, whose runs it compares.
PARTS = (Part("kube_proxy", "scrape", None, _start, _disabled),)
