# SPDX-License-Identifier: Apache-2.0
"""The daemon: opens what can fail first, then measures until a signal, then lets everything go."""

import os
import signal
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

import structlog

from kptrace.daemon.loop import Loop
from kptrace.daemon.parts import Parts
from kptrace.daemon.settings import Settings
from kptrace.export.registry import Exporter
from kptrace.export.selfmetrics import SelfMetrics
from kptrace.export.server import MetricsServer, TlsFiles
from kptrace.export.status import StatusPage

_BUILD_SECONDS_DIGITS = 3


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
        with ExitStack() as stack:
            loop = Loop()
            stack.callback(loop.close)
            self._end_on_signals(loop, stack)
            parts = Parts(self._settings, loop)
            stack.callback(parts.close)
            server = self._serve(parts, stack)
            parts.start()
            self._tell_port(server.port, stack)
            self._log.info("ready", port=server.port, states={s.signal: s.state.value for s in parts.states()})
            loop.run()
            self._log.info("stopping")
