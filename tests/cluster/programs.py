# SPDX-License-Identifier: Apache-2.0
"""Where etcd, kube-apiserver and kube-proxy are, and how one of them runs: logged, waited for, ended."""

import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from kptrace.experiments.interrupts import unhurried
from kptrace.experiments.netns import stop

TOOLS = Path(__file__).parent / "tools"
_POLL_SECONDS = 0.02
_STOP_SECONDS = 10.0
_LOG_LINES = 15


class ClusterError(Exception):
    """A part of the cluster is missing, ended, or did not get there in time."""


def kubernetes_version() -> str:
    """The release that the tools are built of: `v1.36.3`."""
    (version,) = re.findall(
        r"^require k8s\.io/kubernetes (\S+)$", (TOOLS / "go.mod").read_text(), re.MULTILINE
    )
    return version


def search_path(environ: Mapping[str, str] = os.environ) -> str:
    """A PATH on which the programs are found: $KUBEBUILDER_ASSETS, what tools/build.sh built, then the old PATH."""
    cache = Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    built = cache / "kptrace" / "kubernetes" / kubernetes_version()
    parts = (environ.get("KUBEBUILDER_ASSETS"), str(built), environ.get("PATH", os.defpath))
    return os.pathsep.join(filter(None, parts))


def find(name: str) -> str:
    """The path of a program.

    Raises:
        ClusterError: it is nowhere.
    """
    found = shutil.which(name, path=search_path())
    if found is None:
        raise ClusterError(f"there is no {name}: make test-cluster builds it")
    return found


def wait_for(
    condition: Callable[[], bool], what: str, *, seconds: float = 30.0, detail: Callable[[], str] = str
) -> float:
    """Wait until a condition holds; returns how long that took.

    Raises:
        ClusterError: time is up; the message ends with `detail()`.
    """
    begin = time.monotonic()
    while not condition():
        if time.monotonic() - begin > seconds:
            raise ClusterError(f"{what}: not within {seconds:.0f} s {detail()}".rstrip())
        time.sleep(_POLL_SECONDS)
    return time.monotonic() - begin


class HeldPort:
    """A free TCP port of the loopback address that nobody else gets until `close`.

    A server that is told to share its port (SO_REUSEPORT) can listen there; the holder itself never listens, so it
    gets no connections.
    """

    def __init__(self) -> None:
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self._socket.bind(("127.0.0.1", 0))
        self.number: int = self._socket.getsockname()[1]

    def close(self) -> None:
        """Let others have it. Idempotent."""
        self._socket.close()


class Program:
    """A running program; a context manager that ends it. What it says is in a log file.

    It dies with the thread that started it, even by SIGKILL, so start it on the main thread. A terminal's Ctrl-C does
    not reach it: it is ended in order, like everything else.
    """

    def __init__(
        self,
        argv: Sequence[str],
        log: Path,
        *,
        name: str = "",
        environ: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
    ) -> None:
        self.name = name or Path(argv[0]).name
        self.log = log
        with log.open("a", encoding="utf-8") as output:
            self._process: subprocess.Popen[str] = subprocess.Popen(
                # Every program of the line executes the next in its place: the process id stays the same.
                ["setpriv", "--pdeathsig", "KILL", "--", *argv],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environ,
                pass_fds=pass_fds,
                start_new_session=True,
                text=True,
            )
        self.pid = self._process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End it: by SIGTERM, and by SIGKILL where that is not enough. Idempotent."""
        with unhurried():
            stop(self._process, _STOP_SECONDS)

    def kill(self) -> None:
        """End it as a crash would. Idempotent."""
        self._process.kill()
        self._process.wait()

    def wait_until(self, condition: Callable[[], bool], what: str, *, seconds: float = 30.0) -> float:
        """Wait until a condition holds while the program runs; returns how long that took.

        Raises:
            ClusterError: it ended, or time is up; the message has the end of its log.
        """

        def holds() -> bool:
            code = self._process.poll()
            if code is not None:
                raise ClusterError(f"{self.name} ended with exit code {code}\n{self.last_words()}")
            return condition()

        return wait_for(
            holds, f"{self.name}: {what}", seconds=seconds, detail=lambda: f"\n{self.last_words()}"
        )

    def last_words(self) -> str:
        """The end of its log."""
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:])
