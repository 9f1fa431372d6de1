# SPDX-License-Identifier: Apache-2.0
"""What signals that follow tracepoints have in common: maps, programs, the ring of records, and what was lost."""

import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from kptrace.kernel.attach import attach_raw_tracepoint, attach_tracepoint
from kptrace.kernel.bytecode import Bytecode, link
from kptrace.kernel.events import RingBuffer
from kptrace.kernel.load import ProgramType, close_all, load_program
from kptrace.kernel.maps import Map
from kptrace.kernel.tracefs import Tracefs
from kptrace.signals.task_facts import kfuncs


class Attaching:
    """Loads each program once, and attaches it as often as it is asked to."""

    def __init__(self, load: Callable[[str, ProgramType], int], tracefs: Tracefs | None) -> None:
        """Nothing is loaded.

        Args:
            load: makes a descriptor of a program.
            tracefs: of syscall tracepoints; None where only raw ones are asked for.
        """
        self._load = load
        self._tracefs = tracefs
        self._programs: dict[str, int] = {}
        self.attached: list[int] = []

    def raw(self, program: str, tracepoint: str) -> None:
        """Attach to a raw tracepoint."""
        self.attached.append(
            attach_raw_tracepoint(self._program(program, ProgramType.RAW_TRACEPOINT), tracepoint)
        )

    def syscall(self, program: str, tracepoint: str) -> None:
        """Attach to `syscalls/TRACEPOINT`."""
        if self._tracefs is None:
            raise RuntimeError("a syscall tracepoint needs tracefs")
        descriptor = self._program(program, ProgramType.TRACEPOINT)
        self.attached.append(attach_tracepoint(descriptor, self._tracefs, "syscalls", tracepoint))

    def _program(self, name: str, kind: ProgramType) -> int:
        if name not in self._programs:
            self._programs[name] = self._load(name, kind)
        return self._programs[name]

    def close(self) -> None:
        """Let the programs go: what is attached keeps them."""
        for descriptor in self._programs.values():
            os.close(descriptor)


class TracepointPrograms:
    """Maps and programs in the kernel; everything goes away with `close`, or with the process."""

    def __init__(
        self, bytecode: Bytecode, ring: str, reasons: Sequence[str], on_record: Callable[[bytes], None]
    ) -> None:
        """Make the maps; nothing is attached yet.

        Args:
            bytecode: of a source that includes task.h and has a map `lost`.
            ring: the map that records come through.
            reasons: what the words of `lost` count.
            on_record: gets every record from `consume`.
        """
        self._code = bytecode
        self.maps = {name: Map(spec) for name, spec in bytecode.maps.items()}
        self._fds = {name: each.fd for name, each in self.maps.items()}
        self._reasons = tuple(reasons)
        self._words = struct.Struct(f"={len(self._reasons)}Q")
        self._attached: list[int] = []
        self._ring = RingBuffer(self._fds[ring], on_record)
        self._closed = False

    @property
    def fd(self) -> int:
        """Becomes readable when a record waits that woke its reader."""
        return self._ring.fd

    @contextmanager
    def attaching(self, sys_root: Path | None = None) -> Iterator[Attaching]:
        """Attach programs in the body; `sys_root` is where tracefs may be, for syscall tracepoints.

        Raises:
            PrivilegeError, KernelError: the kernel refuses them.
            UnsupportedError: it has no syscall tracepoints.
        """
        tracefs = Tracefs(sys_root) if sys_root is not None else None
        attaching = Attaching(self._load, tracefs)
        try:
            yield attaching
        finally:
            self._attached += attaching.attached
            attaching.close()
            if tracefs is not None:
                tracefs.close()

    def _load(self, name: str, kind: ProgramType) -> int:
        code = link(self._code.functions[name], map_fds=self._fds, kfuncs=kfuncs(self._code.values))
        return load_program(name, code, kind)

    def consume(self) -> int:
        """Hand waiting records to the receiver; return how many."""
        return 0 if self._closed else self._ring.consume()

    def losses(self) -> Mapping[str, int]:
        """Records that never came, by reason."""
        return dict(zip(self._reasons, self._words.unpack_from(self.maps["lost"].memory()), strict=True))

    def close(self) -> None:
        """Detach and free. Idempotent."""
        if self._closed:
            return
        self._closed = True
        close_all(self._attached)
        self._ring.close()
        for each in self.maps.values():
            each.close()
