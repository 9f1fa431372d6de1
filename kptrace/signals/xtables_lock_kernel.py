# SPDX-License-Identifier: Apache-2.0
"""The kernel side of the xtables lock: its maps, its tracepoints, and the ring that records come through."""

import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from kptrace.kernel.attach import attach_raw_tracepoint, attach_tracepoint
from kptrace.kernel.bytecode import Bytecode, link
from kptrace.kernel.compile import Request
from kptrace.kernel.events import RingBuffer
from kptrace.kernel.load import ProgramType, close_all, load_program
from kptrace.kernel.maps import Map
from kptrace.kernel.tracefs import Tracefs
from kptrace.signals.task_facts import TASK_FACTS, kfuncs
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
_LOST = struct.Struct(f"={len(LOST_REASONS)}Q")
_THREAD = struct.Struct("=Q")


class XtablesLockKernel:
    """Maps and programs in the kernel; everything goes away with `close`, or with the process."""

    def __init__(self, bytecode: Bytecode, on_record: Callable[[bytes], None]) -> None:
        """Make the maps; nothing is attached yet. `on_record` gets every record from `consume`."""
        self._code = bytecode
        self._maps = {name: Map(spec) for name, spec in bytecode.maps.items()}
        self._fds = {name: each.fd for name, each in self._maps.items()}
        self._attached: list[int] = []
        self._ring = RingBuffer(self._fds["events"], on_record)
        self._closed = False

    @property
    def fd(self) -> int:
        """Becomes readable when somebody took the lock."""
        return self._ring.fd

    def attach(self, sys_root: Path = Path("/sys")) -> None:
        """Load and attach all programs.

        Raises:
            PrivilegeError, KernelError: the kernel refuses them.
            UnsupportedError: it has no syscall tracepoints.
        """
        tracefs = Tracefs(sys_root)
        programs: list[int] = []
        try:
            programs.append(self._load("lock_decided", ProgramType.RAW_TRACEPOINT))
            self._attached.append(attach_raw_tracepoint(programs[-1], "flock_lock_inode"))
            # Exits first: no entry is ever left without one.
            for name in ("exit_flock", "enter_flock"):
                programs.append(self._load(name, ProgramType.TRACEPOINT))
                self._attached.append(attach_tracepoint(programs[-1], tracefs, "syscalls", f"sys_{name}"))
        finally:
            tracefs.close()
            close_all(programs)

    def _load(self, name: str, kind: ProgramType) -> int:
        code = link(self._code.functions[name], map_fds=self._fds, kfuncs=kfuncs(self._code.values))
        return load_program(name, code, kind)

    def consume(self) -> int:
        """Hand waiting records to the receiver; return how many."""
        return 0 if self._closed else self._ring.consume()

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
        source = self._maps[name]
        for key in source.keys():  # noqa: SIM118  (a BPF map is no dict)
            value = source.lookup(key)
            state = decode(value) if value is not None else None
            if state is not None:
                yield state

    def forget_waiting(self, state: LockState) -> None:
        """Remove a thread that is gone."""
        self._maps["waiting"].delete(_THREAD.pack(state.tgid << 32 | state.tid))

    def forget_attempt(self, state: LockState) -> None:
        """Remove an attempt that will not be repeated."""
        self._maps["attempts"].delete(ATTEMPT.pack(state.file, state.tgid, 0))

    def losses(self) -> Mapping[str, int]:
        """What was not recorded, by reason."""
        return dict(zip(LOST_REASONS, _LOST.unpack_from(self._maps["lost"].memory()), strict=True))

    def close(self) -> None:
        """Detach and free. Idempotent."""
        if self._closed:
            return
        self._closed = True
        close_all(self._attached)
        self._ring.close()
        for each in self._maps.values():
            each.close()
