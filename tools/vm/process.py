# SPDX-License-Identifier: Apache-2.0
"""The processes of test machines: started, limited in time, and always ended, whatever ends us."""

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from tools.vm.errors import VmError

_STOP_SECONDS = 5.0
# How much longer than its limit a machine lives if nobody is left to end it.
_ORPHAN_SECONDS = 30


class Boot:
    """A running machine."""

    def __init__(self, argv: Sequence[str], tools: Path, total_seconds: float) -> None:
        self._begin = time.monotonic()
        self._expired = ""
        self._timers: list[threading.Timer] = []
        # timeout(1) ends the machine even if this process is killed without a chance to.
        backstop = ["timeout", "--kill-after=5", str(int(total_seconds) + _ORPHAN_SECONDS)]
        self._process = subprocess.Popen(
            [*backstop, *argv],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
            env=os.environ | {"PATH": f"{tools}:{os.environ['PATH']}"},
        )

    @property
    def stdout(self) -> IO[str]:
        """What the command prints."""
        if self._process.stdout is None:
            raise VmError("the machine has no output")
        return self._process.stdout

    @property
    def stderr(self) -> IO[str]:
        """The serial console."""
        if self._process.stderr is None:
            raise VmError("the machine has no console")
        return self._process.stderr

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._begin

    @property
    def expired(self) -> str:
        """What did not happen in time; empty if no limit was reached."""
        return self._expired

    def wait(self) -> None:
        """Until the machine is gone."""
        self._process.wait()

    def limit(self, seconds: float, what: str) -> threading.Timer:
        """End the machine so long after its start, unless the timer is cancelled."""

        def expire() -> None:
            self._expired = f"{what} within {seconds:.0f} s"
            self.stop()

        timer = threading.Timer(max(0.0, seconds - self.seconds), expire)
        timer.daemon = True
        timer.start()
        self._timers.append(timer)
        return timer

    def stop(self) -> None:
        """End everything that was started: the group of processes is this machine's own. Idempotent."""
        for timer in self._timers:
            timer.cancel()
        for number, seconds in ((signal.SIGTERM, _STOP_SECONDS), (signal.SIGKILL, None)):
            if self._process.poll() is not None:
                break
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(seconds)


@dataclass
class Host:
    """What all machines of a run share.

    Attributes:
        disk: their root.
        tools: the folder of virtme-ng's commands.
    """

    disk: Path
    tools: Path
    _running: set[Boot] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _closed: bool = False

    @contextmanager
    def start(self, argv: Sequence[str], total_seconds: float) -> Iterator[Boot]:
        """A machine inside, nothing of it afterwards."""
        with self._lock:
            if self._closed:
                raise VmError("interrupted")
            boot = Boot(argv, self.tools, total_seconds)
            self._running.add(boot)
        try:
            yield boot
        finally:
            boot.stop()
            with self._lock:
                self._running.discard(boot)

    @property
    def closed(self) -> bool:
        """Whether machines were ended from outside, so that their failing means nothing."""
        return self._closed

    def close(self) -> None:
        """End all machines, and let no other start. Idempotent."""
        with self._lock:
            self._closed = True
            running = list(self._running)
        for boot in running:
            boot.stop()
