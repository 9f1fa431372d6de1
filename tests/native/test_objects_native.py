# SPDX-License-Identifier: Apache-2.0
"""What kptrace sees of BPF objects of any owner, against bpftool, ip and the file system."""

import errno
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kptrace.experiments.netns import Namespace
from kptrace.kernel import objects
from kptrace.kernel.attach_datapath import attach_xdp
from kptrace.kernel.btf import Btf, Kind
from kptrace.kernel.btf_write import CONTEXTS
from kptrace.kernel.features import probe
from kptrace.kernel.host import Host
from kptrace.kernel.info import recursion_misses
from kptrace.kernel.load import AttachType, ProgramType, load_program
from kptrace.kernel.maps import Map, MapSpec, MapType
from kptrace.kernel.objects import (
    btf_bytes,
    link_ids,
    link_info,
    map_ids,
    map_info,
    open_link,
    open_map,
    open_pin,
    open_program,
    program_ids,
    program_info,
    set_pin,
)
from kptrace.kernel.run_statistics import RunStatistics
from kptrace.model.errors import KernelError, PrivilegeError
from tests.native.objects_bench import bpftool, closing, load, returning, run, using

_LONG = "cil_from_container_of_the_test"
_RUNS = 1009
_KINDS = (
    (ProgramType.SCHED_CLS, AttachType.NONE),
    (ProgramType.XDP, AttachType.NONE),
    (ProgramType.CGROUP_SOCK_ADDR, AttachType.CGROUP_INET4_CONNECT),
)


@pytest.fixture
def two_maps() -> Iterator[tuple[Map, Map]]:
    """Maps for a program to use."""
    made = (
        Map(MapSpec("kpt_first", MapType.HASH, 12, 20, 100)),
        Map(MapSpec("kpt_second", MapType.ARRAY, 4, 8, 3)),
    )
    yield made
    for each in made:
        each.close()


@pytest.fixture
def bpffs(tmp_path: Path) -> Iterator[Path]:
    """A BPF file system of the test's own."""
    path = tmp_path / "bpf"
    path.mkdir()
    subprocess.run(["mount", "-t", "bpf", "bpf", str(path)], check=True)
    yield path
    subprocess.run(["umount", str(path)], check=True)


@pytest.mark.parametrize(("what", "ids"), [("prog", program_ids), ("map", map_ids), ("link", link_ids)])
def test_ids_are_those_that_bpftool_lists(
    what: str, ids: Callable[[], Iterator[int]], namespace: Namespace
) -> None:
    """What is there before and after bpftool looks is in its list, our own object among it; ids rise."""
    program, kept = load("kpt_listed", ProgramType.XDP), Map(MapSpec("kpt_listed", MapType.ARRAY, 4, 4, 1))
    link = namespace.call(lambda: attach_xdp(program, 1, generic=True))
    with closing(program, link):
        own = {"prog": program_info(program).id, "map": map_info(kept.fd).id, "link": link_info(link).id}
        before = list(ids())
        listed = {each["id"] for each in bpftool(what, "list")}
        after = set(ids())
        kept.close()
    assert before == sorted(before)
    assert own[what] in set(before) & after & listed
    assert set(before) & after <= listed


@pytest.mark.parametrize(("kind", "attach_type"), _KINDS)
def test_a_program_is_described_as_bpftool_does(
    kind: ProgramType, attach_type: AttachType, two_maps: tuple[Map, Map]
) -> None:
    """Name, kind, tag, maps and BTF of each kind of program, and its whole name from its BTF."""
    program = load(_LONG, kind, attach_type, using(0, *(each.fd for each in two_maps)))
    with closing(program):
        info = program_info(program)
        shown = bpftool("prog", "show", "id", info.id)
        again = open_program(info.id)
        assert again is not None
        with closing(again):
            assert program_info(again) == info
        types = Btf.parse(btf_bytes(info.btf_id))
    assert (info.type, info.name, info.tag) == (kind, _LONG[:15], shown["tag"])
    assert shown["type"] == kind.name.lower()
    assert list(info.map_ids) == shown["map_ids"] == [map_info(each.fd).id for each in two_maps]
    assert info.btf_id == shown["btf_id"]
    entry = types.type(info.functions[0])
    assert (entry.kind, entry.name) == (Kind.FUNC, shown["name"]) == (Kind.FUNC, _LONG)
    assert types.function_pointers(_LONG) == (CONTEXTS[kind],)
    assert abs(time.clock_gettime_ns(time.CLOCK_BOOTTIME) - info.loaded_ns) < 60e9


def test_programs_with_more_maps_than_room_are_asked_twice(
    two_maps: tuple[Map, Map], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is cut off where the first question had too little room."""
    program = load("kpt_many", code=using(0, *(each.fd for each in two_maps)))
    with closing(program):
        info = program_info(program)
        monkeypatch.setattr(objects, "_MANY", 1)
        assert program_info(program) == info
    assert len(info.map_ids) == 2


def test_a_program_without_btf_has_no_functions() -> None:
    """Its BTF id is 0 and it has no functions to name."""
    program = load_program("kpt_bare", returning(0), ProgramType.SCHED_CLS)
    with closing(program):
        info = program_info(program)
    assert (info.btf_id, info.functions, info.map_ids) == (0, (), ())


def test_what_is_gone_is_none() -> None:
    """An id whose object went away gives None, and BTF of such an id an error with ENOENT."""
    program = load("kpt_gone")
    with closing(program):
        info = program_info(program)
    _until_gone(info.id)
    assert open_program(info.id) is None
    assert open_map(0xFFFFFFF0) is None
    assert open_link(0xFFFFFFF0) is None
    with pytest.raises(KernelError) as caught:
        btf_bytes(0xFFFFFFF0)
    assert caught.value.errno == errno.ENOENT


@pytest.mark.parametrize(
    "spec",
    [
        MapSpec("kpt_hash", MapType.HASH, 12, 20, 1000, 1),
        MapSpec("kpt_lpm", MapType.LPM_TRIE, 8, 5, 77, 1),
        MapSpec("kpt_lru", MapType.LRU_PERCPU_HASH, 3, 7, 99),
    ],
)
def test_a_map_is_described_as_bpftool_does(spec: MapSpec) -> None:
    """Type, sizes, flags and name."""
    made = Map(spec)
    info = map_info(made.fd)
    shown = bpftool("map", "show", "id", info.id)
    made.close()
    expected = (spec.type, spec.key_size, spec.value_size, spec.max_entries, spec.flags, spec.name)
    assert (info.type, info.key_size, info.value_size, info.max_entries, info.flags, info.name) == expected
    assert (
        shown["bytes_key"],
        shown["bytes_value"],
        shown["max_entries"],
        shown["flags"],
        shown["name"],
    ) == (expected[1:])
    assert (info.btf_id, info.btf_key_type, info.btf_value_type) == (0, 0, 0)


def test_runs_are_counted_while_somebody_wants_that() -> None:
    """The kernel's count grows by exactly the runs, bpftool sees the same, and the hold leaves no descriptor behind."""
    descriptors = set(os.listdir("/proc/self/fd"))  # noqa: PTH208
    program = load("kpt_counted")
    with closing(program):
        statistics = RunStatistics()
        with statistics:
            run(program, _RUNS)
            first = program_info(program)
            run(program, 2 * _RUNS)
            second = program_info(program)
            shown = bpftool("prog", "show", "id", first.id)
        statistics.close()
        assert (first.run_count, second.run_count, shown["run_cnt"]) == (_RUNS, 3 * _RUNS, 3 * _RUNS)
        assert 0 < first.run_time_ns < second.run_time_ns == shown["run_time_ns"]
        assert second.recursion_misses == recursion_misses(program) == 0
    assert set(os.listdir("/proc/self/fd")) == descriptors  # noqa: PTH208


def test_without_the_capability_counting_is_refused() -> None:
    """A process without CAP_SYS_ADMIN gets an error that says so by its kind, and EPERM."""
    code = "from kptrace.kernel.run_statistics import RunStatistics; RunStatistics()"
    command = [
        "setpriv",
        "--bounding-set",
        "-sys_admin",
        "--inh-caps",
        "-sys_admin",
        sys.executable,
        "-c",
        code,
    ]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    last = refused.stderr.strip().splitlines()[-1]
    assert last.startswith("kptrace.model.errors.PrivilegeError")
    assert "EPERM" in last


def test_pins_lead_to_their_objects(bpffs: Path) -> None:
    """A pinned map outlives its maker and is opened by its path; what is no pin is refused."""
    made = Map(MapSpec("kpt_pinned", MapType.HASH, 4, 8, 10))
    info = map_info(made.fd)
    set_pin(made.fd, bpffs / "cilium_test")
    made.close()
    fd = open_pin(bpffs / "cilium_test")
    with closing(fd):
        assert map_info(fd) == info
    with pytest.raises(KernelError) as missing:
        open_pin(bpffs / "nothing")
    assert missing.value.errno == errno.ENOENT
    with pytest.raises(KernelError):
        open_pin(Path("/etc/hostname"))


@pytest.mark.parametrize(("kind", "attach_type"), _KINDS)
def test_fentry_on_a_program_is_allowed_where_fentry_is(kind: ProgramType, attach_type: AttachType) -> None:
    """A program with written BTF is a target wherever the kernel lets tracing programs be; elsewhere EPERM says so."""
    program = load(_LONG, kind, attach_type, returning(1))
    with closing(program):
        arguments = {"attach_btf_id": program_info(program).functions[0], "attach_fd": program}
        if probe(Host()).supported("fentry"):
            os.close(
                load_program(
                    "kpt_tracer", returning(0), ProgramType.TRACING, AttachType.TRACE_FENTRY, **arguments
                )
            )
            return
        with pytest.raises(PrivilegeError, match="EPERM"):
            load_program(
                "kpt_tracer", returning(0), ProgramType.TRACING, AttachType.TRACE_FENTRY, **arguments
            )


def _until_gone(program: int) -> None:
    deadline = time.monotonic() + 30
    while program in program_ids():
        assert time.monotonic() < deadline
        time.sleep(0.01)
