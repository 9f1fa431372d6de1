# SPDX-License-Identifier: Apache-2.0
"""Asks another program's metrics server over HTTP, within the watched network namespace."""

import http.client
from urllib.parse import urlsplit

from kptrace.kernel.netns import NetworkNamespace
from kptrace.model.errors import KernelError, UsageError

_TIMEOUT_SECONDS = 5.0
#: They have some hundred kilobytes, or a few megabytes.
_MOST_BYTES = 16 << 20
_OK = 200


class Fetcher:
    """GETs to one HTTP server in a network namespace."""

    def __init__(self, netns: NetworkNamespace, url: str, option: str, example: str) -> None:
        """Ask the server of this URL.

        Args:
            netns: where it listens.
            url: its address; a path in it is for `path`.
            option: what gave the URL, for the error.
            example: a good URL, likewise.

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
                f"{option} {url!r} is no URL of a metrics server", remedy=f"give for example {example}"
            )
        self._netns = netns
        self._host, self._port = parts.hostname, port
        self.path = parts.path

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
