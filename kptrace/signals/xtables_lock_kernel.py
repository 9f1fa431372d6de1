# SPDX-License-Identifier: Apache-2.0
"""The kernel side of the xtables lock: its maps, its tracepoints, and the ring that records come through."""

import struct
from collections.abc import Callable, Iterator
from pathlib import Path

from kptrace.kernel.bytecode import Bytecode
from kptrace.kernel.compile import Request
from kptrace.signals.task_facts import TASK_FACTS
from kptrace.signals.tracepoints import TracepointPrograms
from kptrace.signals.xtables_lock_records import ATTEMPT, LockState, decode

REQUEST = Request(
    "xtables_lock.bpf.c",
    facts={
        **TASK_FACTS,
        "KPT_FILE_DENTRY": "offset:file:f_path.dentry",
        "KPT_DENTRY": "struct:dentry",
        "KPT_DENTRY_NAME": "offset:dentry:d_name.name",
        "KPT_DENTRY_LENGTH": "offset:dentry:d_name.len",
        "KPT_INODE_NUMBER": "offset:inode:i_ino",
        "KPT_INODE_SUPER": "offset:inode:i_sb",
        "KPT_SUPER": "struct:super_block",
        "KPT_SUPER_DEVICE": "offset:super_block:s_dev",
        "KPT_LOCK": "struct:file_lock",
        "KPT_LOCK_FILE": "?offset:file_lock:fl_file",
        "KPT_LOCK_TYPE": "?offset:file_lock:fl_type",
        "KPT_LOCK_FILE_CORE": "?offset:file_lock:c.flc_file",
        "KPT_LOCK_TYPE_CORE": "?offset:file_lock:c.flc_type",
    },
)

LOST_REASONS = ("ring_full", "waits_full", "holds_full")
_THREAD = struct.Struct("=Q")


class XtablesLockKernel(TracepointPrograms):
    """See `TracepointPrograms`."""

    def __init__(self, bytecode: Bytecode, on_record: Callable[[bytes], None]) -> None:
        """Make the maps; nothing is attached yet. `on_record` gets every record from `consume`."""
        super().__init__(bytecode, "events", LOST_REASONS, on_record)

    def attach(self, sys_root: Path = Path("/sys")) -> None:
        """Load and attach all programs.

        Raises:
            PrivilegeError, KernelError: the kernel refuses them.
            UnsupportedError: it has no syscall tracepoints.
        """
        with self.attaching(sys_root) as attaching:
            attaching.raw("lock_decided", "flock_lock_inode")
            # Exits first: no entry is ever left without one.
            attaching.syscall("exit_flock", "sys_exit_flock")
            attaching.syscall("enter_flock", "sys_enter_flock")

    def waiting(self) -> Iterator[LockState]:
        """Threads inside flock(2) now. This and the next two are safe on any thread until `close`."""
        return self._states("waiting")

    def attempts(self) -> Iterator[LockState]:
        """Processes whose last attempt failed; `end_ns` is when."""
        return self._states("attempts")

    def held(self) -> Iterator[LockState]:
        """Who holds a lock now."""
        return self._states("held")

    def _states(self, name: str) -> Iterator[LockState]:
        source = self.maps[name]
        for key in source.keys():  # noqa: SIM118  (a BPF map is no dict)
            value = source.lookup(key)
            state = decode(value) if value is not None else None
            if state is not None:
                yield state

    def forget_waiting(self, state: LockState) -> None:
        """Remove a thread that is gone."""
        self.maps["waiting"].delete(_THREAD.pack(state.tgid << 32 | state.tid))

    def forget_attempt(self, state: LockState) -> None:
        """Remove an attempt that will not be repeated."""
        self.maps["attempts"].delete(ATTEMPT.pack(state.file, state.tgid, 0))
