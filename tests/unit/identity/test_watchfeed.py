# SPDX-License-Identifier: Apache-2.0
"""The API server here is a real HTTP server, asked by the real client with a real kubeconfig."""

import json
import queue
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from kptrace import __version__
from kptrace.identity.client import KubernetesApi
from kptrace.identity.resources import Level, resources
from kptrace.identity.source import Identity
from kptrace.identity.watchfeed import QUEUE_LENGTH, WatchFeed
from kptrace.model.signal import State

END = None


def raw(name: str, version: int = 1, ip: str = "10.96.0.1") -> dict[str, Any]:
    """A Service as a list or an event has it."""
    metadata = {"name": name, "namespace": "ns", "resourceVersion": str(version)}
    return {"metadata": metadata, "spec": {"clusterIP": ip, "ports": [{"port": 80}]}}


class Handler(BaseHTTPRequestHandler):
    """Lists what the server has, and streams what the test puts into its queue."""

    protocol_version = "HTTP/1.1"
    server: "ApiServer"

    def do_GET(self) -> None:
        """Answer a list or a watch."""
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        if "sendInitialEvents" in query:
            self._answer(422, {})
            return
        self.server.seen.append((url.path, query, dict(self.headers)))
        watch = "watch" in query
        self.server.counts["watch" if watch else "list"] += 1
        if self.headers["Authorization"] != f"Bearer {self.server.bearer}":
            self._answer(401, {})
        elif self.server.status != 200:
            self._answer(self.server.status, {})
        elif watch:
            self._stream()
        else:
            items = self.server.items.get(url.path, [])
            self._answer(200, {"metadata": {"resourceVersion": "100"}, "items": items})

    def _answer(self, status: int, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _stream(self) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        while True:
            try:
                item = self.server.events.get(timeout=0.01)
            except queue.Empty:
                if self.server.closing.is_set():
                    self.close_connection = True
                    return
                continue
            if item is END:
                self.wfile.write(b"0\r\n\r\n")
                return
            line = json.dumps(item).encode() + b"\n"
            self.wfile.write(f"{len(line):x}\r\n".encode() + line + b"\r\n")

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class names it so
        """Say nothing."""


class ApiServer(ThreadingHTTPServer):
    """An API server of one resource version."""

    daemon_threads = False

    def __init__(self, port: int = 0) -> None:
        self.items: dict[str, list[Any]] = {}
        self.events: queue.Queue[Any] = queue.Queue()
        self.status = 200
        self.bearer = "t0ken"
        self.seen: list[tuple[str, dict[str, str], dict[str, str]]] = []
        self.counts: Counter[str] = Counter()
        self.closing = threading.Event()
        super().__init__(("127.0.0.1", port), Handler)
        self._thread = threading.Thread(target=self.serve_forever, args=(0.01,))
        self._thread.start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news."""

    def end(self) -> None:
        """Stop, streams included."""
        self.closing.set()
        self.shutdown()
        self._thread.join()
        self.server_close()


@pytest.fixture
def server() -> Iterator[ApiServer]:
    """A running API server with the Service `one`."""
    found = ApiServer()
    found.items["/api/v1/services"] = [raw("one")]
    yield found
    found.end()


def kubeconfig(folder: Path, port: int, bearer: str = "t0ken") -> Path:
    """A kubeconfig that leads to this port."""
    path = folder / "kubeconfig"
    value = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "c",
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{port}"}}],
        "users": [{"name": "u", "user": {"token": bearer}}],
    }
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


Watcher = Callable[..., Identity]


@pytest.fixture
def watching(tmp_path: Path) -> Iterator[Watcher]:
    """Start to watch a port; retries come at once."""
    made: list[Identity] = []

    def start(port: int, level: Level = Level.SERVICES, **options: Any) -> Identity:
        stopped = threading.Event()
        feed = WatchFeed(
            KubernetesApi(kubeconfig(tmp_path, port)),
            resources(level, node="n1", **options),
            start_delay=0,
            rng=random.Random(1),
            pause=lambda seconds: not stopped.wait(min(seconds, 0.01)),
        )
        identity = Identity(feed)
        identity.start()
        made.append(identity)
        return identity

    yield start
    for identity in made:
        identity.close()
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("kptrace-watch")]


def until(identity: Identity, condition: Callable[[], bool]) -> None:
    """Poll until it is so."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, (identity.states(), identity.snapshot())
        identity.poll()
        time.sleep(0.002)


def names(identity: Identity) -> list[str]:
    """The Services that are known."""
    return sorted(port.name for port in identity.snapshot().services.values())


def reasons(identity: Identity) -> set[str]:
    """Why the watches are in the state in which they are."""
    return {state.reason for state in identity.states()}


def test_services_are_listed_and_watched(server: ApiServer, watching: Watcher) -> None:
    """The list makes it ready, events change the names, and requests say who asks with what right."""
    identity = watching(server.server_port)
    until(identity, lambda: identity.ready)
    assert names(identity) == ["one"]
    server.events.put({"type": "ADDED", "object": raw("two", 101, "10.96.0.2")})
    until(identity, lambda: names(identity) == ["one", "two"])
    server.events.put({"type": "DELETED", "object": raw("one", 102)})
    until(identity, lambda: names(identity) == ["two"])
    assert {state.state for state in identity.states()} == {State.ACTIVE}
    path, query, headers = server.seen[0]
    assert path == "/api/v1/services"
    assert query["resourceVersion"] == "0"
    assert headers["User-Agent"] == f"kptrace/{__version__}"
    assert headers["Authorization"] == "Bearer t0ken"


def test_full_watches_pods_of_this_node_and_the_node(server: ApiServer, watching: Watcher) -> None:
    """Each resource has a thread and a state of its own; ready means all of them."""
    server.items["/api/v1/pods"] = [
        {"metadata": {"name": "p", "namespace": "ns"}, "status": {"podIP": "10.1.0.1"}}
    ]
    server.items["/api/v1/nodes"] = [{"metadata": {"name": "n1"}}]
    identity = watching(server.server_port, Level.FULL, endpoint_slices=True)
    until(identity, lambda: identity.ready)
    assert [state.mechanism for state in identity.states()] == [
        "watch_services",
        "watch_endpointslices",
        "watch_pods",
        "watch_nodes",
    ]
    assert list(identity.snapshot().pods_by_ip) == ["10.1.0.1"]
    assert dict(identity.snapshot().nodes) == {"n1": ()}


def test_a_version_that_expires_leads_to_a_new_list(server: ApiServer, watching: Watcher) -> None:
    """After 410 the list is made again, and what it lacks is gone."""
    identity = watching(server.server_port)
    until(identity, lambda: identity.ready)
    server.items["/api/v1/services"] = [raw("other")]
    server.events.put({"type": "ERROR", "object": {"code": 410}})
    until(identity, lambda: names(identity) == ["other"])
    assert server.counts["list"] == 2


def test_a_stream_that_ends_is_watched_again_without_a_list(server: ApiServer, watching: Watcher) -> None:
    """The end of a watch is no error: the next goes on."""
    identity = watching(server.server_port)
    until(identity, lambda: server.counts["watch"] == 1)
    server.events.put(END)
    until(identity, lambda: server.counts["watch"] == 2)
    server.events.put({"type": "ADDED", "object": raw("two", 101, "10.96.0.2")})
    until(identity, lambda: names(identity) == ["one", "two"])
    assert (server.counts["list"], reasons(identity)) == (1, {"ok"})


@pytest.mark.parametrize(
    ("status", "reason"), [(401, "unauthorized"), (403, "forbidden"), (503, "server_error")]
)
def test_a_refusal_is_a_state_until_it_ends(
    server: ApiServer, watching: Watcher, status: int, reason: str
) -> None:
    """Without rights there are no names, a reason says so, and all is well once the rights are given."""
    server.status = status
    identity = watching(server.server_port)
    until(identity, lambda: reasons(identity) == {reason})
    (state,) = identity.states()
    assert state.state is State.UNAVAILABLE
    assert str(status) in state.detail
    assert not identity.ready
    server.status = 200
    until(identity, lambda: identity.ready)
    assert reasons(identity) == {"ok"}


def test_a_server_that_goes_away_leaves_the_last_names(server: ApiServer, watching: Watcher) -> None:
    """When the server is gone its names stay, with their age; when one is back, the watch goes on."""
    identity = watching(server.server_port)
    until(identity, lambda: server.counts["watch"] == 1)
    server.end()
    until(identity, lambda: reasons(identity) == {"unreachable"})
    (state,) = identity.states()
    assert state.state is State.DEGRADED
    assert state.detail.startswith("names are 0 s old: ")
    assert names(identity) == ["one"]
    second = ApiServer(server.server_port)
    try:
        second.events.put({"type": "ADDED", "object": raw("two", 101, "10.96.0.2")})
        until(identity, lambda: names(identity) == ["one", "two"])
        assert reasons(identity) == {"ok"}
    finally:
        identity.close()
        second.end()


def test_nobody_listens_at_the_start(watching: Watcher) -> None:
    """An unreachable server is a state, with an error counter that grows, and start returns."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    identity = watching(port)
    until(identity, lambda: reasons(identity) == {"unreachable"})
    (_, _, errors) = identity.families()
    assert {sample.labels for sample in errors.samples} >= {
        ("api", "unreachable"),
        ("api", "malformed_object"),
    }


def test_a_server_that_hangs_does_not_keep_the_watch_from_ending(watching: Watcher) -> None:
    """A server that accepts and never answers leaves poll free, and close ends the thread."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        identity = watching(silent.getsockname()[1])
        connection, _ = silent.accept()
        identity.poll()
        assert reasons(identity) == {"starting"}
        # A watch that waits for its first byte cannot be interrupted; the peer's end stands for the timeout.
        connection.close()
        until(identity, lambda: reasons(identity) == {"disconnected"})
        closer = threading.Thread(target=identity.close)
        closer.start()
        silent.settimeout(0.01)
        while closer.is_alive():
            try:
                silent.accept()[0].close()
            except TimeoutError:
                continue
        closer.join()


def test_a_kubeconfig_that_is_none_is_a_state(tmp_path: Path) -> None:
    """A broken kubeconfig is told as such, not raised on a thread, and is read again later."""
    broken = tmp_path / "broken"
    broken.write_text("current-context: nowhere\n", encoding="utf-8")
    ticks = threading.Semaphore(2)
    feed = WatchFeed(
        KubernetesApi(broken),
        resources(Level.SERVICES),
        start_delay=0,
        pause=lambda seconds: ticks.acquire(blocking=False),
    )
    identity = Identity(feed)
    identity.start()
    until(identity, lambda: reasons(identity) == {"no_configuration"})
    identity.close()


def test_a_full_queue_makes_the_watch_wait_and_loses_nothing(server: ApiServer, watching: Watcher) -> None:
    """Many events, far more than the queue holds, all arrive although nobody polls meanwhile."""
    identity = watching(server.server_port)
    until(identity, lambda: server.counts["watch"] == 1 and identity.ready)
    feed = identity._feed
    assert isinstance(feed, WatchFeed)
    count = QUEUE_LENGTH * 3
    for index in range(count):
        value = raw(f"s{index}", 101 + index, f"10.97.{index // 256}.{index % 256}")
        server.events.put({"type": "ADDED", "object": value})
    deadline = time.monotonic() + 20
    while not feed._queue.full():
        assert time.monotonic() < deadline
        time.sleep(0.002)
    assert names(identity) == ["one"]
    until(identity, lambda: len(names(identity)) == count + 1)
    assert reasons(identity) == {"ok"}


def test_a_kubeconfig_is_read_again_when_its_token_is_refused(
    server: ApiServer, watching: Watcher, tmp_path: Path
) -> None:
    """A token that was replaced in the file is the one of the next request after 401."""
    identity = watching(server.server_port)
    until(identity, lambda: server.counts["watch"] == 1)
    server.bearer = "an0ther"
    server.events.put(END)
    until(identity, lambda: reasons(identity) == {"unauthorized"})
    assert names(identity) == ["one"]
    kubeconfig(tmp_path, server.server_port, "an0ther")
    server.events.put({"type": "ADDED", "object": raw("two", 101, "10.96.0.2")})
    until(identity, lambda: names(identity) == ["one", "two"])
    assert reasons(identity) == {"ok"}
