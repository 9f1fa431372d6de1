# SPDX-License-Identifier: Apache-2.0
"""The parser of request heads."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kptrace.export.request import MAX_HEAD, MAX_HEADERS, MAX_LINE, BadRequestError, check_size, parse

HOST = b"\r\nHost: x"


def test_a_request_is_understood() -> None:
    """Method, path, query and headers, whose names have no case; repeated ones are joined."""
    head = b"GET /status?format=json&x=1 HTTP/1.1\r\nHOST: a:1\r\nAccept: a\r\naccept:b \r\nX-Empty:"
    request = parse(head)
    assert (request.method, request.path, request.keep_alive) == ("GET", "/status", True)
    assert request.query == {"format": "json", "x": "1"}
    assert request.headers == {"host": "a:1", "accept": "a, b", "x-empty": ""}


def test_an_absolute_target_is_its_path() -> None:
    """What a proxy sends names the host too."""
    assert parse(b"GET http://node:10777/metrics?a=b HTTP/1.1" + HOST).path == "/metrics"
    assert parse(b"GET http://node HTTP/1.1" + HOST).path == "/"


@pytest.mark.parametrize(
    ("head", "keep_alive"),
    [
        (b"GET / HTTP/1.1" + HOST, True),
        (b"GET / HTTP/1.1\r\nConnection: Keep-Alive, Close" + HOST, False),
        (b"GET / HTTP/1.0", False),
        (b"GET / HTTP/1.0\r\nConnection: keep-alive", False),
    ],
)
def test_connections_stay_open_in_http_1_1(head: bytes, keep_alive: bool) -> None:
    """HTTP/1.1 keeps the connection unless told otherwise; HTTP/1.0 never."""
    assert parse(head).keep_alive is keep_alive


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"", 400),
        (b"\r\n", 400),
        (b"GET /", 400),
        (b"GET  / HTTP/1.1" + HOST, 400),
        (b"get / HTTP/1.1" + HOST, 400),
        (b"GET /\x00 HTTP/1.1" + HOST, 400),
        (b"GET /\xff HTTP/1.1" + HOST, 400),
        (b"GET * HTTP/1.1" + HOST, 400),
        (b"GET file:///etc/passwd HTTP/1.1" + HOST, 400),
        (b"GET http://[x HTTP/1.1" + HOST, 400),
        (b"GET / HTTP/1.1", 400),
        (b"GET / HTTP/1.1\r\n folded: x" + HOST, 400),
        (b"GET / HTTP/1.1\r\nspace : x" + HOST, 400),
        (b"GET / HTTP/1.1\r\nno colon" + HOST, 400),
        (b"GET / HTTP/1.1\r\nX: a\rb" + HOST, 400),
        (b"GET / HTTP/1.1\r\nX: a\nb: c" + HOST, 400),
        (b"GET /?" + b"&".join(b"a%d=1" % n for n in range(30)) + b" HTTP/1.1" + HOST, 400),
        (b"GET / HTTP/2.0" + HOST, 505),
        (b"GET / HTTP/1.1\r\nContent-Length: 1" + HOST, 413),
        (b"GET / HTTP/1.1\r\nContent-Length: 0\r\nContent-Length: 9" + HOST, 413),
        (b"GET / HTTP/1.1\r\nTransfer-Encoding: chunked" + HOST, 413),
        (b"GET / HTTP/1.1" + b"\r\nX: y" * (MAX_HEADERS + 1), 431),
    ],
)
def test_what_is_no_plain_request_is_refused(head: bytes, status: int) -> None:
    """Anything ambiguous, and anything with a body, is refused with its status."""
    with pytest.raises(BadRequestError) as refused:
        parse(head)
    assert refused.value.status == status


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"G" * (MAX_LINE + 1), 414),
        (b"G" * (MAX_LINE + 1) + b"\r\n\r\n", 414),
        (b"GET / HTTP/1.1\r\nX: " + b"y" * MAX_HEAD, 431),
        (b"GET / HTTP/1.1\r\nX: " + b"y" * MAX_HEAD + b"\r\n\r\n", 431),
    ],
)
def test_long_heads_are_refused_before_they_end(head: bytes, status: int) -> None:
    """Size is judged as bytes arrive."""
    with pytest.raises(BadRequestError) as refused:
        check_size(head)
    assert refused.value.status == status


def test_a_head_within_the_limits_passes() -> None:
    """The longest request line together with as many headers as there may be."""
    head = b"GET /" + b"a" * (MAX_LINE - 14) + b" HTTP/1.1" + HOST + b"\r\nX: y" * (MAX_HEADERS - 1)
    check_size(head + b"\r\n\r\n")
    assert len(parse(head).path) == MAX_LINE - 13


@pytest.mark.parametrize(
    ("target", "accept", "html"),
    [
        ("/status", "text/html,application/xhtml+xml,*/*;q=0.8", True),
        ("/status", "application/json", False),
        ("/status", "*/*", False),
        ("/status?format=json", "text/html", False),
        ("/status?format=html", "*/*", True),
        ("/status?format=other", "text/html", True),
    ],
)
def test_browsers_are_told_apart(target: str, accept: str, html: bool) -> None:
    """The Accept header decides, unless the query does."""
    assert parse(f"GET {target} HTTP/1.1\r\nHost: x\r\nAccept: {accept}".encode()).wants_html is html


@given(
    st.binary(max_size=300) | st.text(max_size=100).map(lambda t: f"GET /{t} HTTP/1.1\r\nHost: {t}".encode())
)
def test_any_bytes_are_a_request_or_a_refusal(head: bytes) -> None:
    """No input makes another exception, and what is accepted holds no line break."""
    try:
        request = parse(head)
    except BadRequestError:
        return
    assert not any("\n" in value or "\r" in value for value in (request.path, *request.headers.values()))
