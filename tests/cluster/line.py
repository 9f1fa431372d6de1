# SPDX-License-Identifier: Apache-2.0
"""A way to the API server that can be cut, while everybody else still reaches it."""

import contextlib
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.cluster.programs import HeldPort, Program

_RELAY = Path(__file__).parent / "relay.py"


class Line:
    """A context manager: connections to `port` reach the API server.

    Attributes:
        port: of the loopback address.
    """

    def __init__(self, folder: Path, server_port: int) -> None:
        self._folder = folder
        self._server_port = server_port
        self._held = HeldPort()
        self._open = contextlib.ExitStack()
        self.port = self._held.number

    def __enter__(self) -> Self:
        self._mend()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()
        self._held.close()

    @contextlib.contextmanager
    def cut(self) -> Iterator[None]:
        """While the body runs no connection lives, and none is made."""
        self._open.close()
        try:
            yield
        finally:
            self._mend()

    def kubeconfig(self, config: Path) -> Path:
        """A kubeconfig that leads this way."""
        path = config.with_name(f"line-{self.port}.kubeconfig")
        text = config.read_text(encoding="utf-8")
        path.write_text(text.replace(f":{self._server_port}", f":{self.port}"), encoding="utf-8")
        return path

    def _mend(self) -> None:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(("127.0.0.1", self.port))
        listener.listen()
        number = listener.fileno()
        line = [sys.executable, "-I", "-S", str(_RELAY), str(number), str(self._server_port)]
        relay = Program(line, self._folder / "line.log", name="line", pass_fds=(number,))
        listener.close()
        # Its connections end with it.
        self._open.callback(relay.kill)
