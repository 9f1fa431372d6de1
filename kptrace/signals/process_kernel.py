# SPDX-License-Identifier: Apache-2.0
"""The kernel side of what is known of processes: two raw tracepoints, and the ring that records come through."""

import os
import struct
from collections.abc import Callable, Mapping
from typing import Final

from kptrace.kernel.attach import attach_raw_tracepoint
from kptrace.kernel.bytecode import Bytecode, link
from kptrace.kernel.compile import Request
from kptrace.kernel.events import RingBuffer
from kptrace.kernel.load import ProgramType, load_program
from kptrace.kernel.maps import Map
from kptrace.signals.task_facts import TASK_FACTS, kfuncs

REQUEST: Final = Request(
    "process.bpf.c",
    facts={
        **TASK_FACTS,
        "KPT_TASK_MM": "offset:task_struct:mm",
        "KPT_TASK_EXIT_CODE": "offset:task_struct:exit_code",
        "KPT_MM": "struct:mm_struct",
        "KPT_MM_ARG_START": "offset:mm_struct:arg_start",
        "KPT_MM_ARG_END": "offset:mm_struct:arg_end",
        "KPT_BINPRM": "struct:linux_binprm",
        "KPT_BINPRM_FILENAME": "offset:linux_binprm:filename",
    },
)

_TRACEPOINTS: Final = {"sched_process_exit": "process_exit", "sched_process_exec": "process_exec"}
LOST_REASONS: Final = ("process_ring_full",)
_LOST: Final = struct.Struct(f"={len(LOST_REASONS)}Q")


class ProcessKernel:
    """Maps and programs in the kernel; everything goes away with `close`, or with the process."""

    def __init__(self, bytecode: Bytecode, on_record: Callable[[bytes], None]) -> None:
        """Make the maps; nothing is attached yet. `on_record` gets every record from `consume`."""
        self._code = bytecode
        self._maps = {name: Map(spec) for name, spec in bytecode.maps.items()}
        self._fds = {name: each.fd for name, each in self._maps.items()}
        self._attached: list[int] = []
        self._ring = RingBuffer(self._fds["processes"], on_record)
        self._closed = False

    def attach(self) -> None:
        """Load and attach all programs.

        Raises:
            PrivilegeError, KernelError: the kernel refuses them.
        """
        for tracepoint, name in _TRACEPOINTS.items():
            code = link(self._code.functions[name], map_fds=self._fds, kfuncs=kfuncs(self._code.values))
            program = load_program(name, code, ProgramType.RAW_TRACEPOINT)
            try:
                self._attached.append(attach_raw_tracepoint(program, tracepoint))
            finally:
                os.close(program)

    def consume(self) -> int:
        """Hand waiting records to the receiver; return how many."""
        return 0 if self._closed else self._ring.consume()

    def losses(self) -> Mapping[str, int]:
        """Records that never came, by reason."""
        return dict(zip(LOST_REASONS, _LOST.unpack_from(self._maps["lost"].memory()), strict=True))

    def close(self) -> None:
        """Detach and free. Idempotent."""
        if self._closed:
            return
        self._closed = True
        while self._attached:
            os.close(self._attached.pop())
        self._ring.close()
        for each in self._maps.values():
            each.close()
