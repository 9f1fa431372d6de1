# SPDX-License-Identifier: Apache-2.0
"""Tracepoint numbers from tracefs: the host's mount where there is one, else a private mount that nobody else sees."""

import ctypes
import os
from pathlib import Path

from kptrace.kernel.syscall import syscall
from kptrace.model.errors import KernelError, UnsupportedError

_FSOPEN_CLOEXEC = 1
_FSMOUNT_CLOEXEC = 1
_FSCONFIG_CMD_CREATE = 6


class Tracefs:
    """Read access to `events/GROUP/NAME/id`."""

    def __init__(self, sys_root: Path = Path("/sys")) -> None:
        """Find tracefs below `sys_root`, or mount one privately.

        Raises:
            UnsupportedError: neither is there, or it is empty.
        """
        self._fd = -1
        for candidate in (sys_root / "kernel/tracing", sys_root / "kernel/debug/tracing"):
            if (candidate / "events").is_dir():
                self._fd = os.open(candidate, os.O_PATH | os.O_CLOEXEC)
                self.origin = str(candidate)
                return
        try:
            self._fd = _private_mount()
        except KernelError as error:
            raise UnsupportedError(
                f"tracefs is not mounted at /sys/kernel/tracing and a private mount was refused: {error}",
                remedy="mount tracefs at /sys/kernel/tracing, or grant CAP_SYS_ADMIN",
            ) from error
        if not os.access("events", os.F_OK, dir_fd=self._fd):
            # Linux kernel commit bf8e602186ec ("tracing: Do not create tracefs files if tracefs lockdown is in effect") (in
            # v5.4): to mount it succeeds all the same.
            self.close()
            raise UnsupportedError(
                "a private mount of tracefs has no events", remedy="see the lockdown in 'kptrace check'"
            )
        self.origin = "private mount"

    def event_id(self, group: str, name: str) -> int:
        """The tracepoint's number for perf_event_open(2).

        Raises:
            UnsupportedError: this kernel has no such tracepoint.
        """
        try:
            fd = os.open(f"events/{group}/{name}/id", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._fd)
        except OSError as error:
            raise UnsupportedError(
                f"this kernel has no tracepoint {group}:{name} ({error.strerror})",
                remedy="use a kernel with CONFIG_FTRACE_SYSCALLS",
            ) from error
        with os.fdopen(fd, "rb") as file:
            return int(file.read())

    def close(self) -> None:
        """Let the mount go. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _private_mount() -> int:
    """Mount tracefs without attaching it to any tree: the mount ends with its descriptor."""
    context = syscall("fsopen", ctypes.c_char_p(b"tracefs"), ctypes.c_uint(_FSOPEN_CLOEXEC))
    try:
        syscall(
            "fsconfig",
            ctypes.c_int(context),
            ctypes.c_uint(_FSCONFIG_CMD_CREATE),
            None,
            None,
            ctypes.c_int(0),
        )
        return syscall("fsmount", ctypes.c_int(context), ctypes.c_uint(_FSMOUNT_CLOEXEC), ctypes.c_uint(0))
    finally:
        os.close(context)
