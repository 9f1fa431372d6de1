# SPDX-License-Identifier: Apache-2.0
"""The real daemon as a process beside an embedded node: started, waited for, scraped, stopped."""

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from kptrace.experiments.interrupts import unhurried
from kptrace.experiments.netns import stop
from kptrace.experiments.scrape import Scrape, fetch
from kptrace.model.errors import KptraceError

_STOP_SECONDS = 10.0
_POLL_SECONDS = 0.02
_OK = 200


@dataclass(frozen=True, slots=True)
class DaemonRequest:
    """What a run needs from the daemon.

    Attributes:
        netns: the namespace to watch.
        identity_file: the Services' manifests.
        ready_file: where the daemon writes its port once samples can come.
    """

    netns: Path
    identity_file: Path
    ready_file: Path


def default_command(request: DaemonRequest) -> list[str]:
    """The command of the installed kptrace, on a free port of the loopback address."""
    return [
        sys.executable,
        "-m",
        "kptrace",
        "run",
        "--netns",
        str(request.netns),
        "--identity-file",
        str(request.identity_file),
        "--listen",
        "127.0.0.1:0",
        "--local-socket",
        "none",
        "--ready-file",
        str(request.ready_file),
    ]


class DaemonProcess:
    """A context manager: a ready daemon inside, nothing of it afterwards.

    Attributes:
        startup_seconds: from the start of the process until it said that it is ready.
        port: where it listens.
    """

    def __init__(
        self,
        argv: Sequence[str],
        ready_file: Path,
        log: Path,
        *,
        ready_seconds: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._argv = list(argv)
        self._ready_file = ready_file
        self._log = log
        self._ready_seconds = ready_seconds
        self._clock = clock
        self._sleep = sleep
        self._process: subprocess.Popen[str] | None = None
        self.startup_seconds = 0.0
        self.port = 0

    def __enter__(self) -> Self:
        begin = self._clock()
        with self._log.open("w", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                self._argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        try:
            self._wait(begin + self._ready_seconds)
        except BaseException:
            self.stop()
            raise
        self.startup_seconds = self._clock() - begin
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End the daemon. Idempotent."""
        with unhurried():
            if self._process is not None:
                stop(self._process, _STOP_SECONDS)
                self._process = None

    @property
    def pid(self) -> int:
        """The running daemon's process id."""
        if self._process is None:
            raise KptraceError("the daemon does not run")
        return self._process.pid

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self.port}"

    def _wait(self, deadline: float) -> None:
        while not self._ready():
            code = None if self._process is None else self._process.poll()
            if code is not None:
                raise KptraceError(f"the daemon ended with exit code {code}: {self._last_line()}")
            if self._clock() > deadline:
                raise KptraceError(
                    f"the daemon was not ready within {self._ready_seconds:.0f} s: {self._last_line()}",
                    remedy="run 'kptrace check'",
                )
            self._sleep(_POLL_SECONDS)

    def _ready(self) -> bool:
        """Whether it has written its port, and answers there that it is ready."""
        if not self.port:
            try:
                text = self._ready_file.read_text(encoding="utf-8").strip()
            except FileNotFoundError:
                return False
            digits = text.rsplit(":", 1)[-1].strip("/")
            if not digits.isdigit():
                return False
            self.port = int(digits)
        try:
            return fetch(self.port, "/readyz")[0] == _OK
        except OSError:
            return False

    def _last_line(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"

    def scrape(self) -> Scrape:
        """What /metrics has now.

        Raises:
            KptraceError: it does not answer, or not with metrics.
        """
        try:
            status, text = fetch(self.port)
        except OSError as error:
            raise KptraceError(
                f"the daemon does not answer: {error}; it said last: {self._last_line()}"
            ) from error
        if status != _OK:
            raise KptraceError(f"/metrics answered {status}: {text[:200]}")
        return Scrape(text)

    def scrape_until(self, enough: Callable[[Scrape], bool], *, seconds: float = 5.0) -> Scrape:
        """Scrape until a condition holds, or time is up: the last scrape either way."""
        deadline = self._clock() + seconds
        while not enough(latest := self.scrape()) and self._clock() < deadline:
            self._sleep(_POLL_SECONDS)
        return latest
