# SPDX-License-Identifier: Apache-2.0
"""What the network does to a request, with real sockets."""

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kptrace.identity.api import ApiError
from kptrace.identity.client import KubernetesApi

Peer = Callable[[socket.socket], None]


@pytest.fixture
def asked(tmp_path: Path) -> Iterator[Callable[..., KubernetesApi]]:
    """An API server that treats its one connection as told; without a peer nobody listens."""
    endings: list[Callable[[], None]] = []

    def make(peer: Peer | None, scheme: str = "http") -> KubernetesApi:
        listener = socket.create_server(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        if peer is None:
            listener.close()
        else:
            endings.append(served(listener, peer))
        config = {
            "current-context": "c",
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
            "clusters": [{"name": "c", "cluster": {"server": f"{scheme}://127.0.0.1:{port}"}}],
            "users": [{"name": "u", "user": {}}],
        }
        path = tmp_path / "kubeconfig"
        path.write_text(json.dumps(config), encoding="utf-8")
        return KubernetesApi(path)

    yield make
    for end in endings:
        end()


def served(listener: socket.socket, peer: Peer) -> Callable[[], None]:
    """Give the first connection to the peer; the result ends it."""
    over = threading.Event()

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(65536)
            with contextlib.suppress(OSError):  # the client was quicker to hang up
                peer(connection)
            over.wait(20)

    thread = threading.Thread(target=serve)
    thread.start()

    def end() -> None:
        over.set()
        thread.join()
        listener.close()

    return end


def silent(connection: socket.socket) -> None:
    """Accept, and never answer."""


def stuck(connection: socket.socket) -> None:
    """Begin to stream, and say no more."""
    connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")


def cut(connection: socket.socket) -> None:
    """Begin to stream, and hang up in the middle of a chunk."""
    connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\nabc")
    connection.shutdown(socket.SHUT_RDWR)


def garbage(connection: socket.socket) -> None:
    """Answer with something that is no HTTP."""
    connection.sendall(b"SSH-2.0-OpenSSH_9.9\r\n")
    connection.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize(
    ("peer", "scheme", "reason"),
    [
        (None, "http", "unreachable"),
        (silent, "http", "timeout"),
        (stuck, "http", "timeout"),
        (cut, "http", "disconnected"),
        (garbage, "http", "disconnected"),
        (garbage, "https", "tls"),
    ],
)
def test_each_failure_of_the_network_has_its_reason(
    asked: Callable[..., KubernetesApi], peer: Peer | None, scheme: str, reason: str
) -> None:
    """No exception of the HTTP library comes through; texts are short and without memory addresses."""
    api = asked(peer, scheme)
    with pytest.raises(ApiError) as caught:
        response = api.get("/api/v1/services", {"watch": "1"}, read_timeout=0.1)
        try:
            list(response.chunks())
        finally:
            response.close()
    assert caught.value.reason == reason
    assert "0x" not in str(caught.value)
    api.close()


def test_close_ends_a_read_that_waits(asked: Callable[..., KubernetesApi]) -> None:
    """A watch that waits for its next event ends when the daemon does, and nothing is asked after that."""
    api = asked(stuck)
    response = api.get("/api/v1/services", {"watch": "1"}, read_timeout=60)
    chunks = response.chunks()
    assert next(chunks) == b"abc"
    ended: list[str] = []

    def read() -> None:
        try:
            list(chunks)
        except ApiError as error:
            ended.append(error.reason)

    reader = threading.Thread(target=read)
    reader.start()
    api.close()
    reader.join(20)
    assert ended == ["disconnected"]
    response.close()
    with pytest.raises(ApiError, match="closed"):
        api.get("/api/v1/services", {}, read_timeout=1)


def test_without_any_configuration_the_error_says_so(tmp_path: Path) -> None:
    """Outside a cluster and without a kubeconfig there is nothing to ask."""
    with pytest.raises(ApiError) as caught:
        KubernetesApi(tmp_path / "none", environ={}).get("/version", {}, read_timeout=1)
    assert caught.value.reason == "no_configuration"
