# SPDX-License-Identifier: Apache-2.0
"""The daemon: opens what can fail first, then measures until a signal, then lets everything go."""

import os
import signal
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import structlog

from kptrace.daemon.local import open_local
from kptrace.daemon.loop import Loop
from kptrace.daemon.parts import Parts
from kptrace.daemon.settings import Settings
from kptrace.export.listen import listen_tcp
from kptrace.export.registry import Exporter
from kptrace.export.selfmetrics import SelfMetrics
from kptrace.export.server import MetricsServer, TlsFiles
from kptrace.export.status import StatusPage
from kptrace.kernel.allocator import give_memory_back
from kptrace.model.signal import Source


class Daemon:
    """One run of `kptrace run`."""

    def __init__(self, settings: Settings) -> None:
        """Nothing is opened before `run`."""
        self._settings = settings
        self._log = structlog.get_logger()

    def run(self) -> None:
        """Measure until SIGTERM or SIGINT.

        Raises:
            KptraceError: what cannot be mended by going on: an address in use, a bad manifest, no privileges.
        """
        # A commit wakes this process: as a batch job it waits for its turn, instead of taking the CPU from the writer
        # whose system call is just returning.
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        give_memory_back()
        with ExitStack() as stack:
            loop = Loop()
            stack.callback(loop.close)
            for number in (signal.SIGTERM, signal.SIGINT):
                before = signal.signal(number, lambda *_: loop.call_soon_threadsafe(loop.stop))
                stack.callback(signal.signal, number, before)
            parts = Parts(self._settings, loop)
            stack.callback(parts.close)
            exporter = self._exporter(parts)
            server = self._server(parts, exporter)
            stack.callback(server.close)
            server.start()
            if self._settings.local_socket is not None:
                local = open_local(self._settings.local_socket, parts, exporter)
                if local is not None:
                    stack.callback(local.close)
                    local.start()
            parts.start()
            if self._settings.ready_file is not None:
                _write_whole(self._settings.ready_file, f"{server.port}\n")
            self._log.info("ready", port=server.port, from_cache=parts.from_cache)
            loop.run()
            self._log.info("stopping")

    def _exporter(self, parts: Parts) -> Exporter:
        own = SelfMetrics(parts.states, parts.reports.losses, proxy=parts.reports.proxy)

        def sources() -> Sequence[Source]:
            return [*parts.sources, own]

        return Exporter(sources, max_series=self._settings.max_series)

    def _server(self, parts: Parts, exporter: Exporter) -> MetricsServer:
        settings = self._settings
        tls = None
        if settings.tls_certificate is not None and settings.tls_key is not None:
            tls = TlsFiles(settings.tls_certificate, settings.tls_key, settings.tls_client_ca)
        return MetricsServer(
            listen_tcp(settings.address()),
            exporter,
            StatusPage(parts.states, lambda: parts.reports.sections(names=settings.status_names)),
            lambda: parts.ready,
            tls,
        )


def _write_whole(path: Path, text: str) -> None:
    """Write a file that nobody sees half of."""
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.rename(path)
