# SPDX-License-Identifier: Apache-2.0
"""Whether tracing programs can be attached to programs here, and what a pair around an empty one reads."""

import os
from typing import Final

from kptrace.kernel.attach import attach_tracing
from kptrace.kernel.btf_write import load_btf, program_btf
from kptrace.kernel.load import AttachType, ProgramType, load_program
from kptrace.kernel.objects import ProgramInfo, program_info
from kptrace.kernel.test_run import run_program
from kptrace.model.errors import KernelError, KptraceError
from kptrace.signals.datapath_cells import FLOOR_GROUP, group_words, mean_ns
from kptrace.signals.datapath_targets import Target
from kptrace.signals.datapath_tracer import DatapathTracer
from kptrace.signals.sampling import Sampling

_NAME: Final = "kpt_empty"
_RUNS: Final = 509
# r0 = 0; exit
_RETURN_0: Final = bytes.fromhex("b700000000000000 9500000000000000")


def empty_program(name: str = _NAME) -> int:
    """Load a program for packets that does nothing, with BTF of its own, and return its descriptor.

    Raises:
        KernelError, PrivilegeError: the kernel refused it.
    """
    types = program_btf(name, ProgramType.SCHED_CLS)
    btf = load_btf(types.blob)
    try:
        return load_program(
            name, _RETURN_0, ProgramType.SCHED_CLS, btf_fd=btf, function_info=types.function_info
        )
    finally:
        os.close(btf)  # the program holds it


def tracing_refusal() -> KptraceError | None:
    """Why no tracing program can be attached to a program here; None if one can. Leaves nothing behind."""
    try:
        target = empty_program()
        try:
            info = program_info(target)
            tracer = load_program(
                "kpt_tracer",
                _RETURN_0,
                ProgramType.TRACING,
                AttachType.TRACE_FEXIT,
                attach_btf_id=info.functions[0] if info.functions else 0,
                attach_fd=target,
            )
            try:
                os.close(attach_tracing(tracer))
            finally:
                os.close(tracer)
        finally:
            os.close(target)
    except KptraceError as error:
        return error
    return None


def measure_floor(tracer: DatapathTracer) -> float:
    """Seconds that a pair around an empty program reads in the mean. Arms the programs, for every run.

    Raises:
        KernelError: the kernel refused something, or no run was counted.
    """
    program = empty_program()
    try:
        target = _target(program_info(program))
        tracer.configure(armed=True, sampling=Sampling(1, 1))
        tracer.attach(target, FLOOR_GROUP)
        try:
            # The first runs are of cold caches: they would be a part of the mean.
            run_program(program, _RUNS)
            tracer.clear(FLOOR_GROUP)
            run_program(program, _RUNS)
        finally:
            tracer.release(target.program_id)
    finally:
        os.close(program)
    mean = mean_ns(group_words(tracer.memory("cells"), FLOOR_GROUP))
    if mean is None:
        raise KernelError("the floor cannot be measured: no run of an empty program was counted")
    return mean / 1e9


def _target(info: ProgramInfo) -> Target:
    return Target(info.id, info.type, info.btf_id, info.functions[0], "empty", "none", "", 0)
