# SPDX-License-Identifier: Apache-2.0
"""Who runs: from the kernel's records, for all signals that name writers or follow their runs."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from kptrace.kernel.bytecode import Bytecode
from kptrace.kernel.host import Host
from kptrace.signals.process_kernel import ProcessKernel
from kptrace.signals.process_records import Exec, Exit, decode
from kptrace.signals.processes import ProcessTable, read_process


class ProcessWatch:
    """One for the daemon. For the loop's thread."""

    def __init__(self, bytecode: Bytecode, host: Host = Host()) -> None:
        """Nothing is attached before `start`; `bytecode` is of `process_kernel.REQUEST`."""
        self._inbox: deque[bytes] = deque()
        self._kernel = ProcessKernel(bytecode, self._inbox.append)
        self._listeners: tuple[Callable[[Exec | Exit], None], ...] = ()
        host_mntns = _inode(host.proc / "1/ns/mnt")
        self.table = ProcessTable(lambda tgid: read_process(host.proc, tgid, host_mntns), host_mntns)
        self._undecodable = 0
        self._last: Mapping[str, int] | None = None

    def start(self, listeners: Iterable[Callable[[Exec | Exit], None]] = ()) -> None:
        """Attach; each listener gets every record from now on, when the table has it.

        Raises:
            PrivilegeError, KernelError: the kernel refuses it.
        """
        self._listeners = tuple(listeners)
        self._kernel.attach()

    def consume(self) -> ProcessTable:
        """Take in everything up to now, and return the table."""
        self._kernel.consume()
        while self._inbox:
            record = decode(self._inbox.popleft())
            if record is None:
                self._undecodable += 1
                continue
            self.table.apply(record, time.monotonic())
            for listener in self._listeners:
                listener(record)
        return self.table

    def losses(self) -> Mapping[str, int]:
        """Records that were lost, by reason."""
        lost = self._kernel.losses() if self._last is None else self._last
        return {**lost, "process_undecodable": self._undecodable}

    def close(self) -> None:
        """Detach. Idempotent."""
        if self._last is None:
            self._last = self._kernel.losses()
        self._kernel.close()


def _inode(path: Path) -> int:
    try:
        return path.stat().st_ino
    except OSError:
        return 0
