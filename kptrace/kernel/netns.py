# SPDX-License-Identifier: Apache-2.0
"""Network namespaces as things to step into and to watch for their end."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kptrace.kernel import syscall
from kptrace.model.errors import KernelError, UsageError

_SELF = Path("/proc/thread-self/ns/net")


class NetworkNamespace:
    """A network namespace, held open by a descriptor.

    A held namespace is a pinned namespace: call `close` when `ended` says so.
    """

    def __init__(self, path: Path | None = None) -> None:
        """Open the namespace at `path` (`/run/netns/NAME`, `/proc/PID/ns/net`), by default the caller's own.

        Raises:
            UsageError: there is no network namespace at the path.
        """
        self.path = path
        try:
            self._fd = os.open(path or _SELF, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise UsageError(
                f"cannot open the network namespace {path}: {error.strerror}", remedy="see 'ip netns list'"
            ) from error
        self.inode = os.fstat(self._fd).st_ino
        try:
            with self.enter():
                pass
        except KernelError as error:
            os.close(self._fd)
            raise UsageError(
                f"{path} is not a network namespace that can be entered: {error}",
                remedy="see 'ip netns list'",
            ) from error

    @contextmanager
    def enter(self) -> Iterator[None]:
        """Run the body with the calling thread inside the namespace."""
        back = os.open(_SELF, os.O_RDONLY | os.O_CLOEXEC)
        try:
            syscall.setns(self._fd)
            try:
                yield
            finally:
                syscall.setns(back)
        finally:
            os.close(back)

    def ended(self) -> bool:
        """Whether the path no longer leads to this namespace (`ip netns del`, or its process is gone)."""
        if self.path is None:
            return False
        try:
            return self.path.stat().st_ino != self.inode
        except OSError:
            return True

    def close(self) -> None:
        """Let the namespace go. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
