# SPDX-License-Identifier: Apache-2.0
"""The kernel side of what is known of processes: two raw tracepoints, and the ring that records come through."""

from collections.abc import Callable
from typing import Final

from kptrace.kernel.bytecode import Bytecode
from kptrace.kernel.compile import Request
from kptrace.signals.task_facts import TASK_FACTS
from kptrace.signals.tracepoints import TracepointPrograms

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


class ProcessKernel(TracepointPrograms):
    """See `TracepointPrograms`."""

    def __init__(self, bytecode: Bytecode, on_record: Callable[[bytes], None]) -> None:
        """Make the maps; nothing is attached yet. `on_record` gets every record from `consume`."""
        super().__init__(bytecode, "processes", LOST_REASONS, on_record)

    def attach(self) -> None:
        """Load and attach all programs.

        Raises:
            PrivilegeError, KernelError: the kernel refuses them.
        """
        with self.attaching() as attaching:
            for tracepoint, name in _TRACEPOINTS.items():
                attaching.raw(name, tracepoint)
