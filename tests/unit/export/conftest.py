# SPDX-License-Identifier: Apache-2.0
"""Servers on free loopback ports; they end with the test."""

from collections.abc import Callable, Iterator, Sequence

import pytest

from kptrace.export.listen import listen_tcp
from kptrace.export.registry import Exporter
from kptrace.export.routes import Readiness
from kptrace.export.server import Limits, MetricsServer, TlsFiles
from kptrace.export.status import StatusPage
from kptrace.model.signal import MechanismState, Source, State
from tests.unit.export.fakes import FakeSource, counters

Serve = Callable[..., MetricsServer]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Start servers."""
    started: list[MetricsServer] = []

    def start(
        *sources: Source,
        limits: Limits | None = None,
        tls: TlsFiles | None = None,
        ready: Callable[[], Readiness] = lambda: True,
        states: Callable[[], Sequence[MechanismState]] = lambda: [
            MechanismState("lookup", "bracket", State.ACTIVE)
        ],
    ) -> MetricsServer:
        exporter = Exporter(lambda: sources or (FakeSource("one", counters(input=23.0)),))
        server = MetricsServer(
            listen_tcp(("127.0.0.1", 0)), exporter, StatusPage(states, dict), ready, tls, limits
        )
        started.append(server)
        server.start()
        return server

    yield start
    for server in started:
        server.close()
