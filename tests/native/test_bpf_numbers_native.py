# SPDX-License-Identifier: Apache-2.0
"""Numbers and offsets of the bpf system call, against the running kernel's own types."""

import struct
from enum import IntEnum
from pathlib import Path

import pytest

from kptrace.kernel import foreign_map, object_ids, objects
from kptrace.kernel.btf import Btf, BtfMissing
from kptrace.kernel.load import AttachType, ProgramType
from kptrace.kernel.maps import MapType
from kptrace.kernel.objects import LinkType
from kptrace.kernel.syscall import Command


@pytest.fixture(scope="module")
def btf() -> Btf:
    """The running kernel's types."""
    return Btf.load(Path("/sys/kernel/btf/vmlinux"))


def _pairs(prefix: str, numbers: type) -> dict[str, int]:
    if issubclass(numbers, IntEnum):
        return {f"{prefix}{each.name}": each.value for each in numbers}
    return {f"{prefix}{name}": value for name, value in vars(numbers).items() if name.isupper()}


def test_numbers_are_the_kernels(btf: Btf) -> None:
    """Every command, kind of program, map and link, and every hook has the kernel's number."""
    ours = {
        **_pairs("BPF_", Command),
        **_pairs("BPF_PROG_TYPE_", ProgramType),
        **_pairs("BPF_MAP_TYPE_", MapType),
        **_pairs("BPF_LINK_TYPE_", LinkType),
        **_pairs("BPF_", AttachType),
        "BPF_STATS_RUN_TIME": 0,
    }
    del ours["BPF_NONE"]
    assert {name: btf.enum_value(name) for name in ours} == ours


@pytest.mark.parametrize(
    ("name", "layout", "members"),
    [
        (
            "bpf_prog_info",
            objects._PROGRAM,
            "type id tag load_time nr_map_ids name btf_id nr_func_info run_time_ns run_cnt recursion_misses",
        ),
        (
            "bpf_map_info",
            objects._MAP,
            "type id key_size value_size max_entries map_flags name btf_id btf_key_type_id btf_value_type_id",
        ),
        ("bpf_link_info", objects._LINK, "type id prog_id"),
        ("bpf_btf_info", objects.BTF_INFO, "btf btf_size id name name_len kernel_btf"),
        (
            "bpf_attr",
            foreign_map._BATCH,
            "batch.in_batch batch.out_batch batch.keys batch.values batch.count batch.map_fd batch.elem_flags batch.flags",
        ),
        ("bpf_attr", objects._OBJECT, "pathname bpf_fd file_flags"),
        ("bpf_attr", object_ids._NEXT_ID, "start_id next_id open_flags"),
        ("bpf_attr", object_ids._GET_INFO, "info.bpf_fd info.info_len info.info"),
        ("bpf_func_info", objects._FUNCTION_INFO, "insn_off type_id"),
    ],
)
def test_structures_are_read_where_the_kernel_writes(
    btf: Btf, name: str, layout: struct.Struct, members: str
) -> None:
    """Each member, marked in memory where the kernel has it, is found by Python's layout as the next one."""
    for number, path in enumerate(members.split()):
        member = btf.member(name, path)
        at, size = member.bit_offset // 8, btf.size_of(member.type_id)
        memory = bytearray(512)
        memory[at : at + size] = b"\xff" * size
        read = layout.unpack_from(memory)
        assert len(read) == len(members.split())
        marked = [
            index for index, value in enumerate(read) if value and value != bytes(16) and value != bytes(8)
        ]
        assert marked == [number], path
        assert read[number] in (b"\xff" * size, (1 << 8 * size) - 1), path


def test_offsets_of_what_is_asked_are_the_kernels(btf: Btf) -> None:
    """Where a question about a program says where its maps and functions are to go; where a link's own part begins."""
    at = {
        path: btf.member_offset("bpf_prog_info", path)
        for path in ("nr_map_ids", "map_ids", "func_info_rec_size")
    }
    assert at["nr_map_ids"] == objects._MAP_IDS == at["map_ids"] - 4
    assert at["func_info_rec_size"] == objects._FUNCTIONS
    assert btf.member_offset("bpf_prog_info", "func_info") == objects._FUNCTIONS + 4
    assert (
        btf.member_offset("bpf_prog_info", "nr_func_info")
        == objects._FUNCTIONS + 12
        == objects._PROGRAM_ASKED - 4
    )
    for path in ("cgroup.cgroup_id", "xdp.ifindex", "tcx.ifindex", "netkit.ifindex", "tracing.attach_type"):
        try:
            assert btf.member_offset("bpf_link_info", path) == objects._LINK_KIND, path
        except BtfMissing:
            assert path.startswith(("tcx", "netkit"))
    assert btf.member_offset("bpf_link_info", "cgroup.attach_type") == objects._LINK_KIND + 8
    assert btf.member_offset("bpf_link_info", "tcx.attach_type") == objects._LINK_KIND + 4
