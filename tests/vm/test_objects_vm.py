# SPDX-License-Identifier: Apache-2.0
"""Other owners' BPF objects on old and new kernels: read whole, counted, and traced where tracing programs are allowed."""

import pytest

from kptrace.kernel.attach import attach_tracing
from kptrace.kernel.btf import Btf
from kptrace.kernel.host import Host
from kptrace.kernel.load import AttachType, ProgramType, load_program
from kptrace.kernel.maps import MapType
from kptrace.kernel.memlock import raise_memlock
from kptrace.kernel.objects import btf_bytes, program_info
from kptrace.kernel.run_statistics import RunStatistics
from tests.native.objects_bench import READABLE, closing, filled_map, load, returning, run

_RUNS = 1009
_NAME = "cil_from_container_of_the_test"


@pytest.fixture(autouse=True)
def _memory() -> None:
    """Old kernels count maps and programs against a limit, which kptrace's own start lifts."""
    assert raise_memlock() == ""


@pytest.mark.parametrize("kind", [ProgramType.SCHED_CLS, ProgramType.XDP])
@pytest.mark.parametrize("when", [AttachType.TRACE_FENTRY, AttachType.TRACE_FEXIT])
def test_a_tracing_program_runs_as_often_as_its_target(kind: ProgramType, when: AttachType) -> None:
    """The kernel takes a program's written BTF as a target's: the tracer runs once for each run of the program."""
    target = load(_NAME, kind)
    info = program_info(target)
    types = Btf.parse(btf_bytes(info.btf_id))
    assert types.type(info.functions[0]).name == _NAME
    tracer = load_program(
        "kpt_tracer",
        returning(0),
        ProgramType.TRACING,
        when,
        attach_btf_id=types.func_id(_NAME),
        attach_fd=target,
    )
    link = attach_tracing(tracer)
    with closing(target, tracer, link), RunStatistics():
        run(target, _RUNS)
        assert program_info(target).run_count == _RUNS
        assert program_info(tracer).run_count == _RUNS


@pytest.mark.parametrize("kind", READABLE)
def test_foreign_maps_are_read_whole(kind: MapType) -> None:
    """Every type of map that has entries is read whole, by batches or without."""
    with filled_map(kind, 3000, Host().possible_cpus()) as (foreign, written, _):
        assert dict(foreign.read(4000)) == written
        assert foreign.count(4000) == len(written)
