# SPDX-License-Identifier: Apache-2.0
"""Listening sockets: a TCP address, and a path for those who are on the node with the daemon's rights."""

import errno
import os
import socket
from contextlib import suppress
from pathlib import Path

from kptrace.model.errors import ListenError

BACKLOG = 64


def listen_tcp(address: tuple[str, int]) -> socket.socket:
    """Listen on host and port; port 0 takes any free one.

    Raises:
        ListenError: the address is in use, or not ours.
    """
    host, port = address
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server(
            address,
            family=family,
            backlog=BACKLOG,
            dualstack_ipv6=host == "::" and socket.has_dualstack_ipv6(),
        )
    except OSError as error:
        shown = f"[{host}]:{port}" if family == socket.AF_INET6 else f"{host}:{port}"
        raise ListenError(
            f"cannot listen on {shown}: {error.strerror or error}",
            remedy="choose another address with --listen, or end what listens there",
        ) from error


def listen_unix(path: Path) -> socket.socket:
    """Listen on a path that only its owner may open; what a dead process left there is replaced.

    Raises:
        ListenError: a living process listens there, or nothing can be made there.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # Made under another name and renamed: nobody finds it before its mode is set, and never with the mode of the umask.
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        if _answers(path):
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
        listener.bind(str(partial))
        partial.chmod(0o600)
        listener.listen(BACKLOG)
        partial.rename(path)
    except OSError as error:
        listener.close()
        with suppress(FileNotFoundError, NotADirectoryError):
            partial.unlink()
        raise ListenError(
            f"cannot listen on {path}: {error.strerror or error}",
            remedy="choose another path with --local-socket, or 'none'",
        ) from error
    return listener


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        return True
