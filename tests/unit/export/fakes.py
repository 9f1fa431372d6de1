# SPDX-License-Identifier: Apache-2.0
"""Sources, servers and clients of the export tests."""

import math
import socket
import ssl
import time
from collections.abc import Callable, Iterable, Sequence
from http.client import HTTPConnection, HTTPSConnection
from pathlib import Path

from kptrace.model.metrics import HistogramSample, MetricFamily, MetricSpec, Sample
from kptrace.model.signal import MechanismState

COUNT = MetricSpec("kptrace_packets_total", "counter", "Packets.", ("hook",))
SIZE = MetricSpec("kptrace_objects", "gauge", "Objects.", ("table", "object"))
DURATION = MetricSpec("kptrace_walk_duration_seconds", "histogram", "How long.", ("chain", "walk"))
BRACKET = MetricSpec("kptrace_bracket_info", "info", "Which chains.", ("chain",))
LADDER = (5e-07, 1e-06, 0.25, math.inf)


def histogram(labels: tuple[str, ...], *counts: int, total: float = 0.5) -> HistogramSample:
    """A histogram over LADDER with these cumulative counts."""
    return HistogramSample(labels, tuple(zip(LADDER, counts, strict=True)), total)


class FakeSource:
    """A source that yields what it is given; an exception among the families is raised in its turn."""

    def __init__(
        self, name: str, *families: MetricFamily | Exception, specs: Sequence[MetricSpec] = ()
    ) -> None:
        """`specs` describe it, if not the families do."""
        self.name = name
        self.given = list(families)
        self.reads = 0
        self._specs = specs

    def describe(self) -> Sequence[MetricSpec]:
        """See `Source`."""
        return self._specs or [each.spec for each in self.given if isinstance(each, MetricFamily)]

    def families(self) -> Iterable[MetricFamily]:
        """See `Source`."""
        self.reads += 1
        for each in self.given:
            if isinstance(each, Exception):
                raise each
            yield each

    def states(self) -> Sequence[MechanismState]:
        """See `Source`."""
        return ()


def counters(**values: float) -> MetricFamily:
    """COUNT with one sample a hook."""
    return MetricFamily(COUNT, [Sample((hook,), value) for hook, value in values.items()])


def until(condition: Callable[[], bool], seconds: float = 10) -> bool:
    """Wait for a condition; whether it came true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def get(
    port: int,
    path: str,
    headers: dict[str, str] | None = None,
    *,
    method: str = "GET",
    tls: ssl.SSLContext | None = None,
) -> tuple[int, dict[str, str], bytes]:
    """One request on a connection of its own: status, headers by lower-case name, body."""
    connection = (
        HTTPSConnection("127.0.0.1", port, timeout=20, context=tls)
        if tls
        else HTTPConnection("127.0.0.1", port, timeout=20)
    )
    try:
        connection.request(method, path, headers=headers or {})
        response = connection.getresponse()
        return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
    finally:
        connection.close()


def exchange(port: int, sent: bytes) -> bytes:
    """Send bytes as they are and read until the server ends the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        client.sendall(sent)
        received = b""
        while chunk := client.recv(65536):
            received += chunk
        return received


def fake_proc(root: Path) -> Path:
    """A procfs with one process, whose name is as nasty as a process may choose; its own folder is returned."""
    own = root / "self"
    (own / "fd").mkdir(parents=True)
    for number in range(7):
        (own / "fd" / str(number)).touch()
    (root / "stat").write_text("cpu  1 2 3 4\nbtime 1700000000\nprocesses 5\n")
    fields = ["S", *["0"] * 10, "150", "50", *["0"] * 6, "12345", "99999999", "2560", *["0"] * 28]
    (own / "stat").write_text(f"42 (a) b (c) {' '.join(fields)}\n")
    return own
