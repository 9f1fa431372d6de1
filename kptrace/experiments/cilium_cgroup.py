# SPDX-License-Identifier: Apache-2.0
"""A cgroup of the experiment's own, so that its socket programs see its own connections and nobody else's."""

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from kptrace.experiments.interrupts import unhurried
from kptrace.model.errors import UnsupportedError

_PREFIX = "kpt-cgroup"
_NAME = re.compile(rf"{_PREFIX}-(\d+)-[0-9a-f]+")
_PROCESSES = "cgroup.procs"


def cgroup_root(proc: Path = Path("/proc")) -> Path:
    """Where the unified hierarchy is mounted.

    Raises:
        UnsupportedError: it is not.
    """
    for line in (proc / "self/mounts").read_text(encoding="utf-8").splitlines():
        _, where, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(where)
    raise UnsupportedError(
        "no cgroup2 file system is mounted", remedy="mount -t cgroup2 none /sys/fs/cgroup/unified"
    )


class Cgroup:
    """A cgroup directly below the root; a context manager that removes it.

    Attributes:
        path: its directory.
    """

    def __init__(self, root: Path | None = None, proc: Path = Path("/proc")) -> None:
        self._root = root or cgroup_root(proc)
        self._proc = proc
        self.path = self._root / f"{_PREFIX}-{os.getpid()}-{secrets.token_hex(4)}"

    def __enter__(self) -> Self:
        for path in sorted(self._root.glob(f"{_PREFIX}-*")):
            match = _NAME.fullmatch(path.name)
            if match and not (self._proc / match[1]).exists():
                with suppress(FileNotFoundError):  # another run sweeps too, and was faster
                    path.rmdir()
        self.path.mkdir()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with unhurried():
            self.path.rmdir()

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Run the body with the whole calling process in the cgroup: sockets belong to it that are made meanwhile."""
        line = next(
            each
            for each in (self._proc / "self/cgroup").read_text(encoding="utf-8").splitlines()
            if each.startswith("0::")
        )
        before = self._root / line.removeprefix("0::").lstrip("/") / _PROCESSES
        (self.path / _PROCESSES).write_text(str(os.getpid()), encoding="ascii")
        try:
            yield
        finally:
            before.write_text(str(os.getpid()), encoding="ascii")
