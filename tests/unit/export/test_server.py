# SPDX-License-Identifier: Apache-2.0
"""The server by real sockets: what it answers, and what it does not let clients do."""

import gzip
import json
import socket
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection

import pytest

from kptrace.export.listen import listen_tcp
from kptrace.export.page import STYLE_SOURCE
from kptrace.export.registry import Exporter
from kptrace.export.request import MAX_HEAD, MAX_HEADERS, MAX_LINE
from kptrace.export.server import Limits, MetricsServer
from kptrace.export.status import StatusPage
from kptrace.model.errors import ListenError
from kptrace.model.metrics import MetricFamily, Sample
from tests.unit.export.conftest import Serve
from tests.unit.export.fakes import COUNT, FakeSource, counters, exchange, get, until

BROWSER = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
REQUEST = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"


class Gate(FakeSource):
    """A source whose readers wait until it is opened."""

    def __init__(self) -> None:
        """A closed gate."""
        super().__init__("gate", counters(input=1.0))
        self.opened = threading.Event()
        self.inside = 0

    def families(self) -> Iterable[MetricFamily]:
        """See `Source`."""
        self.inside += 1
        assert self.opened.wait(30)
        return super().families()


def client_threads() -> int:
    """How many connections are being served."""
    return sum(1 for thread in threading.enumerate() if thread.name == "kptrace-client")


def test_paths_answer(serve: Serve) -> None:
    """Each path with its status and type; unknown ones are not found."""
    port = serve().port
    status, headers, body = get(port, "/metrics")
    assert (status, headers["content-type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    assert b'kptrace_packets_total{hook="input"} 23.0' in body
    assert get(port, "/healthz")[::2] == (200, b"ok\n")
    assert json.loads(get(port, "/status")[2])["signals"][0]["state"] == "active"
    assert get(port, "/status")[1]["content-type"] == "application/json"
    assert b"<table>" in get(port, "/status", BROWSER)[2]
    assert json.loads(get(port, "/status?format=json", BROWSER)[2])["signals"]
    assert b'href="metrics"' in get(port, "/", BROWSER)[2]
    assert get(port, "/metrics/../etc/passwd")[0] == 404


def test_browsers_are_told_to_run_nothing(serve: Serve) -> None:
    """Every answer forbids scripts and guessing of types; the page's own style is the only one."""
    port = serve().port
    for path in ("/", "/status", "/metrics", "/nowhere"):
        _, headers, _ = get(port, path, BROWSER)
        assert headers["content-security-policy"].startswith("default-src 'none'; style-src 'sha256-")
        assert STYLE_SOURCE in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"


def test_readiness_is_asked_each_time(serve: Serve) -> None:
    """503 with its reason until ready; liveness does not depend on it."""
    now: list[bool | tuple[bool, str]] = [(False, "compiling")]
    port = serve(ready=lambda: now[0]).port
    assert get(port, "/readyz")[::2] == (503, b"compiling\n")
    assert get(port, "/healthz")[0] == 200
    now[0] = False
    assert get(port, "/readyz")[::2] == (503, b"starting\n")
    now[0] = True
    assert get(port, "/readyz")[::2] == (200, b"ready\n")


def test_head_is_get_without_the_body(serve: Serve) -> None:
    """HEAD has the length of what GET would send, and nothing more."""
    port = serve().port
    status, headers, body = get(port, "/healthz", method="HEAD")
    assert (status, headers["content-length"], body) == (200, "3", b"")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE"])
def test_other_methods_are_refused(serve: Serve, method: str) -> None:
    """Only GET and HEAD are allowed, and the answer says so."""
    status, headers, _ = get(serve().port, "/metrics", method=method)
    assert (status, headers["allow"]) == (405, "GET, HEAD")


def test_a_connection_serves_many_requests(serve: Serve) -> None:
    """HTTP/1.1 connections stay open, and requests that arrive at once are answered in turn."""
    port = serve().port
    connection = HTTPConnection("127.0.0.1", port, timeout=20)
    for _ in range(3):
        connection.request("GET", "/metrics", headers={"Accept-Encoding": "gzip"})
        response = connection.getresponse()
        assert response.getheader("Content-Encoding") == "gzip"
        assert b"kptrace_packets_total" in gzip.decompress(response.read())
    assert client_threads() == 1
    connection.close()
    answer = exchange(port, REQUEST + b"HEAD / HTTP/1.1\r\nHost: x\r\n\r\n" + REQUEST.replace(b"1.1", b"1.0"))
    assert answer.count(b"HTTP/1.1 200 OK\r\n") == 3
    assert answer.endswith(b"ok\n")


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET /" + b"a" * MAX_LINE + b" HTTP/1.1\r\nHost: x\r\n\r\n", b"414"),
        (b"G" * 1_000_000, b"414"),
        (b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X: y\r\n" * MAX_HEADERS + b"\r\n", b"431"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"y" * MAX_HEAD + b"\r\n\r\n", b"431"),
        (b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X: y\r\n" * 100_000, b"431"),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 900000\r\n\r\n" + b"x" * 900_000, b"413"),
        (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", b"400"),
    ],
)
def test_what_is_too_large_is_refused(serve: Serve, sent: bytes, status: bytes) -> None:
    """The client reads why, the connection ends, and the server goes on."""
    port = serve().port
    answer = exchange(port, sent)
    assert answer.startswith(b"HTTP/1.1 " + status)
    assert b"\r\nConnection: close\r\n" in answer
    assert get(port, "/healthz")[0] == 200


def test_the_sixth_scrape_is_sent_away(serve: Serve) -> None:
    """Five scrapes run at a time; a sixth gets 503 with Retry-After, health stays reachable, and all five end well."""
    gate = Gate()
    port = serve(gate).port
    with ThreadPoolExecutor(5) as pool:
        running = [pool.submit(get, port, "/metrics") for _ in range(5)]
        assert until(lambda: gate.inside == 5)
        status, headers, _ = get(port, "/metrics")
        assert (status, headers["retry-after"]) == (503, "1")
        assert get(port, "/healthz")[0] == 200
        gate.opened.set()
        assert [future.result()[0] for future in running] == [200] * 5
    assert get(port, "/metrics")[0] == 200


def test_slow_clients_pin_no_scrape(serve: Serve) -> None:
    """Many who never finish their request, more than there are connections, keep no scrape from its slot."""
    port = serve(limits=Limits(connections=8)).port
    slow = [socket.create_connection(("127.0.0.1", port)) for _ in range(30)]
    for client in slow:
        client.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\nX: ")
    for _ in range(3):
        assert get(port, "/metrics")[0] == 200
    assert until(lambda: client_threads() <= 8)
    for client in slow:
        client.close()
    assert until(lambda: client_threads() == 0)


def test_a_request_has_a_deadline(serve: Serve) -> None:
    """A byte now and then does not extend the time for a request."""
    port = serve(limits=Limits(timeout=0.5)).port
    begin = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        client.sendall(b"GET /metrics HTTP/1.1\r\nX: ")
        client.settimeout(0.05)
        answer = b""
        while not answer:
            assert time.monotonic() - begin < 15
            try:
                answer = client.recv(100)
            except TimeoutError:
                client.sendall(b"y")
    assert answer.startswith(b"HTTP/1.1 408")
    assert time.monotonic() - begin >= 0.5


def test_silent_clients_are_let_go(serve: Serve) -> None:
    """Who sends nothing, at first or after an answer, is disconnected without a word."""
    port = serve(limits=Limits(timeout=0.2)).port
    assert exchange(port, b"") == b""
    assert exchange(port, REQUEST).endswith(b"\r\n\r\nok\n")


def test_who_does_not_read_is_let_go(serve: Serve) -> None:
    """A client that takes nothing of a large answer loses its connection after its time."""
    many = FakeSource(
        "many", MetricFamily(COUNT, [Sample((f"{n:03}" + "x" * 40_000,), 1.0) for n in range(500)])
    )
    port = serve(many, limits=Limits(timeout=0.5)).port
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", port))
        client.sendall(REQUEST.replace(b"/healthz", b"/metrics"))
        assert until(lambda: many.reads == 1)
        assert until(lambda: client_threads() == 0)
    assert get(port, "/healthz")[0] == 200


def test_a_failure_is_one_answer_only(serve: Serve) -> None:
    """Whatever raises while answering gives 500 without inner details; the next request is served."""

    def fail() -> list[object]:
        raise RuntimeError("secret")

    port = serve(states=fail, ready=fail).port
    for path in ("/status", "/readyz"):
        status, _, body = get(port, path)
        assert status == 500
        assert b"secret" not in body
    assert get(port, "/metrics")[0] == 200


def test_clients_that_vanish_disturb_nobody(serve: Serve) -> None:
    """A reset in the middle of a request or of an answer ends that connection alone."""
    port = serve().port
    for sent in (b"", b"GET /met", REQUEST * 50):
        client = socket.create_connection(("127.0.0.1", port))
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.sendall(sent)
        client.close()
    assert get(port, "/healthz")[0] == 200
    assert until(lambda: client_threads() == 0)


def test_closing_lets_answers_arrive(serve: Serve) -> None:
    """`close` ends idle connections at once, waits for the scrape that runs, and frees the port."""
    gate = Gate()
    server = serve(gate)
    port = server.port
    with ThreadPoolExecutor(2) as pool:
        scrape = pool.submit(get, port, "/metrics")
        assert until(lambda: gate.inside == 1)
        # After the scrape's connection, so that it is let go after that one was told to end.
        with socket.create_connection(("127.0.0.1", port), timeout=20) as idle:
            assert until(lambda: client_threads() == 2)
            closing = pool.submit(server.close)
            assert idle.recv(1) == b""
        gate.opened.set()
        status, headers, body = scrape.result()
        closing.result()
    assert (status, headers["connection"]) == (200, "close")
    assert b"kptrace_packets_total" in body
    assert client_threads() == 0
    server.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
    socket.create_server(("127.0.0.1", port)).close()


def test_closing_without_start_frees_the_port() -> None:
    """A server that never served can be closed."""
    server = MetricsServer(
        listen_tcp(("127.0.0.1", 0)), Exporter(lambda: ()), StatusPage(list, dict), lambda: True
    )
    port = server.port
    server.close()
    socket.create_server(("127.0.0.1", port)).close()


@pytest.mark.parametrize(
    ("host", "shown"), [("127.0.0.1", "127.0.0.1:{}"), ("::1", "[::1]:{}")], ids=["ipv4", "ipv6"]
)
def test_a_port_in_use_is_named(host: str, shown: str) -> None:
    """The error has the address, the reason and what to do."""
    try:
        taken = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        pytest.skip(f"no {host}: {error}")
    with taken, pytest.raises(ListenError) as refused:
        port = taken.getsockname()[1]
        listen_tcp((host, port))
    assert shown.format(port) in str(refused.value)
    assert "in use" in str(refused.value)
    assert "--listen" in refused.value.remedy


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid"])
def test_an_address_that_is_not_ours_is_named(host: str) -> None:
    """An address of another host, or none, is an error with the address."""
    with pytest.raises(ListenError, match=host):
        listen_tcp((host, 10777))
