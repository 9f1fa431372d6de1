# SPDX-License-Identifier: Apache-2.0
"""Network namespaces of our own: made, entered and always removed."""

import os
import re
import secrets
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from kptrace.experiments import command
from kptrace.experiments.interrupts import unhurried
from kptrace.kernel.netns import NetworkNamespace
from kptrace.model.errors import KptraceError, UnsupportedError

PREFIX = "kpt"
RUN_NETNS = Path("/run/netns")
_NAME = re.compile(rf"{PREFIX}-[a-z0-9]+-(\d+)-[0-9a-f]+")
_STOP_SECONDS = 3.0

T = TypeVar("T")


def stop(process: "subprocess.Popen[str]", seconds: float = _STOP_SECONDS) -> None:
    """End a process: SIGTERM, and SIGKILL where that is not enough. Idempotent."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            stream.close()


def sweep(directory: Path = RUN_NETNS, proc: Path = Path("/proc")) -> tuple[str, ...]:
    """Remove namespaces that dead processes of ours left behind (SIGKILL), and return their names."""
    removed = []
    for path in sorted(directory.iterdir()) if directory.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if match and not (proc / match[1]).exists():
            try:
                command.run(["ip", "netns", "del", path.name])
            except UnsupportedError:
                # Another run sweeps too, and was faster.
                if path.exists():
                    raise
                continue
            removed.append(path.name)
    return tuple(removed)


class Namespace:
    """A named network namespace (`kpt-ROLE-PID-RANDOM`) with its loopback up; a context manager that removes it.

    Attributes:
        name: as `ip netns list` shows it.
        path: what `--netns` and `nsenter --net=` take.
    """

    def __init__(self, role: str) -> None:
        self.name = f"{PREFIX}-{role}-{os.getpid()}-{secrets.token_hex(4)}"
        self.path = RUN_NETNS / self.name
        self._handle: NetworkNamespace | None = None
        self._processes: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Self:
        try:
            command.run(["ip", "netns", "add", self.name])
            self._handle = NetworkNamespace(self.path)
            # Duplicate address detection would keep IPv6 addresses tentative for a second.
            self.sysctl(
                {
                    "net.ipv6.conf.all.accept_dad": "0",
                    "net.ipv6.conf.default.accept_dad": "0",
                    "net.ipv6.conf.default.router_solicitations": "0",
                }
            )
            self.ip(["link set lo up"])
        except BaseException:
            self.remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def remove(self) -> None:
        """End what runs inside and delete the namespace. Idempotent."""
        with unhurried():
            while self._processes:
                stop(self._processes.pop())
            if self._handle is not None:
                self._handle.close()
                self._handle = None
            if self.path.exists():
                command.run(["ip", "netns", "del", self.name])

    def ip(self, lines: Iterable[str]) -> None:
        """Run lines of `ip -batch` inside."""
        command.run(["ip", "-n", self.name, "-batch", "-"], stdin="\n".join(lines) + "\n")

    def sysctl(self, values: Mapping[str, str]) -> None:
        """Set `net.*` values of this namespace."""

        def write() -> None:
            # /proc/sys/net shows the namespace of the thread that looks.
            for name, value in values.items():
                Path("/proc/sys", *name.split(".")).write_text(value, encoding="ascii")

        self.call(write)

    @contextmanager
    def enter(self) -> Iterator[None]:
        """Run the body with the calling thread inside the namespace."""
        if self._handle is None:
            raise KptraceError(
                f"the namespace {self.name} is not there", remedy="use it as a context manager"
            )
        with self._handle.enter():
            yield

    def call(self, function: Callable[[], T]) -> T:
        """Run a function inside, in a thread of its own: the caller never moves, whatever interrupts it."""
        results: list[T] = []
        errors: list[BaseException] = []

        def body() -> None:
            try:
                with self.enter():
                    results.append(function())
            except BaseException as error:  # noqa: BLE001 - handed to the caller, whatever it is
                errors.append(error)

        thread = threading.Thread(target=body, name=self.name, daemon=True)
        thread.start()
        thread.join()
        if errors:
            raise errors[0]
        return results[0]

    def popen(self, argv: Sequence[str], *, stdin: bool = False) -> "subprocess.Popen[str]":
        """Start a program inside; it is ended with the namespace at the latest."""
        process = self.call(lambda: command.start(argv, stdin=stdin))
        self._processes.append(process)
        return process

    def run(self, argv: Sequence[str], *, stdin: str | None = None) -> str:
        """Run a program inside to its end and return what it printed.

        Raises:
            UnsupportedError: it is not installed, or failed.
        """
        process = self.popen(argv, stdin=stdin is not None)
        try:
            return command.finish(process, stdin=stdin)
        finally:
            self._processes.remove(process)
