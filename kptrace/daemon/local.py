# SPDX-License-Identifier: Apache-2.0
"""The local socket: /status with all names, records and Services, for whoever may open a socket of the daemon's user."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import structlog

from kptrace.daemon.parts import Parts
from kptrace.export.listen import listen_unix
from kptrace.export.registry import Exporter
from kptrace.export.server import MetricsServer
from kptrace.export.status import StatusPage
from kptrace.model.errors import ListenError

Document = Mapping[str, object] | None


def documents(
    record: Callable[[str], Document], explain: Callable[[str, str], Document], path: str
) -> object | None:
    """The JSON document at a path beyond those of the network; None where there is none."""
    match path.split("/"):
        case ["", "records", number]:
            return record(number)
        case ["", "services", namespace, name]:
            return explain(namespace, name)
    return None


def open_local(path: Path, parts: Parts, exporter: Exporter) -> MetricsServer | None:
    """Serve at `path`; None, and a warning, where that cannot be: nothing else depends on it."""
    try:
        listener = listen_unix(path)
    except ListenError as error:
        structlog.get_logger().warning("local_socket_unavailable", detail=error.one_line())
        return None
    return MetricsServer(
        listener,
        exporter,
        StatusPage(parts.states, lambda: parts.reports.sections(names=True)),
        lambda: parts.ready,
        documents=lambda asked: documents(parts.reports.record, parts.reports.explain, asked),
        on_close=lambda: _remove(path),
    )


def _remove(path: Path) -> None:
    with suppress(FileNotFoundError):
        path.unlink()
