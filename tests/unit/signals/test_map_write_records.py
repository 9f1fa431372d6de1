# SPDX-License-Identifier: Apache-2.0
"""The records of map writes mean in Python what they mean in C, and no bytes harm the decoder."""

import os
import re
import struct
from errno import E2BIG, EFAULT, ENOENT
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kptrace.model.errors import UnsupportedError
from kptrace.signals import map_write_kernel as kernel
from kptrace.signals.map_write_records import (
    ENTRY_BYTES,
    HEAD,
    Command,
    Flag,
    MapWrite,
    Replacement,
    decode,
)
from tests.unit.c_layout import BPF, numbers, run

HEADER = "kptrace/map_write.h"


def record(
    command: int = Command.UPDATE,
    *,
    kind: int = 1,
    result: int = 0,
    flags: int = 0,
    asked: int = 1,
    done: int = 0,
    copied: int = 0,
    sizes: tuple[int, int] = (4, 2),
    data: bytes = b"",
) -> bytes:
    """A record as the kernel side hands it over."""
    return (
        HEAD.pack(kind, command, 1, 2, result, 3, 4, flags, 5, 6, asked, done, copied, *sizes, b"cil") + data
    )


def write(data: bytes) -> MapWrite:
    """The record's write, which it must have."""
    found = decode(data)
    assert isinstance(found, MapWrite)
    return found


def test_a_write_is_read_as_c_writes_it(tmp_path: Path) -> None:
    """Every member of C's `struct write_head` arrives under its own name, and the entries behind it."""
    made = run(
        tmp_path,
        HEADER,
        "struct write_head head = { .kind = WRITE_MAP, .command = 26, .begin_ns = 1ULL << 63, .end_ns = 5, .result = -7,"
        " .tgid = 0x80000001, .tid = 3, .flags = WRITE_BATCH | WRITE_VALUES, .number = 8, .object = 9, .asked = 12,"
        " .done = 3, .copied = 2, .key_size = 3, .value_bytes = 1, .name = { 0 } };\n"
        'dump(head); for (const char *at = "aaabbbxy"; *at; at++) putchar(*at);',
    )
    assert decode(made) == MapWrite(
        begin_ns=1 << 63,
        end_ns=5,
        tgid=0x80000001,
        tid=3,
        command=Command.UPDATE_BATCH,
        map=8,
        map_id=9,
        result=-7,
        asked=12,
        count=3,
        size=12 * 4,
        entries=((b"aaa", b"x"), (b"bbb", b"y")),
        truncated=True,
    )


def test_a_replacement_is_read_as_c_writes_it(tmp_path: Path) -> None:
    """A program's name is the bytes in the order in which they were read."""
    made = run(
        tmp_path,
        HEADER,
        "struct write_head head = { .kind = WRITE_PROGRAM, .command = 29, .begin_ns = 4, .end_ns = 5, .result = -1,"
        " .tgid = 2, .tid = 3, .object = 9, .name = { 0x6f72665f6c6963, 0 } };\ndump(head);",
    )
    assert decode(made) == Replacement(4, 5, 2, 3, Command.LINK_UPDATE, -1, "cil_fro", 9)


def test_layouts_and_constants_are_those_of_the_header(tmp_path: Path) -> None:
    """Sizes, offsets, flags and reasons of loss are the same numbers on both sides."""
    expected = {
        "sizeof(struct write_head)": HEAD.size,
        "__builtin_offsetof(struct write_record, data)": HEAD.size,
        "sizeof(struct watched_map)": kernel._WATCHED.size,
        "__builtin_offsetof(struct write_started, begin_ns)": 0,
        "__builtin_offsetof(struct write_started, attributes)": 8,
        "__builtin_offsetof(struct write_started, keys)": kernel._STARTED.size,
        "ROLE_AGENT": kernel._ROLE_AGENT,
        "ROLE_SELF": kernel._ROLE_SELF,
        "ENTRY_BYTES": ENTRY_BYTES,
        **{f"WRITE_{flag.name}": flag.value for flag in Flag},
        **{f"LOST_{reason.upper()}": n for n, reason in enumerate(kernel.LOST_REASONS)},
    }
    assert numbers(tmp_path, HEADER, *expected) == expected


def test_commands_and_bounds_are_those_of_the_program() -> None:
    """Each call that the kernel side looks at has a name here, and the tables are as large as is said here."""
    calls = (BPF / "include/kptrace/map_write_call.h").read_text()
    looked_at = re.findall(r"^#define (?:MAP|PROG|LINK)_\w+ (\d+)$", calls, re.MULTILINE)
    assert sorted(map(int, looked_at)) == sorted(Command)
    program = (BPF / "map_write.bpf.c").read_text()
    bounds = {
        name: int(size) for name, size in re.findall(r"^#define (MAX_\w+) (\d+)$", program, re.MULTILINE)
    }
    assert bounds["MAX_WATCHED"] == kernel.MAX_WATCHED
    assert bounds["MAX_AGENTS"] == kernel.MAX_AGENTS + 1


@pytest.mark.parametrize(
    ("command", "result", "asked", "done", "count", "failed", "absent"),
    [
        (Command.UPDATE_BATCH, 0, 5, 5, 5, False, False),
        (Command.UPDATE_BATCH, -E2BIG, 5, 2, 2, True, False),
        (Command.UPDATE_BATCH, -EFAULT, 5, 5, 0, True, False),  # it failed before it wrote the count
        (Command.DELETE_BATCH, -ENOENT, 5, 0, 0, False, True),
        (Command.UPDATE_BATCH, -ENOENT, 5, 1, 1, True, False),  # BPF_EXIST
        (Command.LOOKUP_AND_DELETE_BATCH, -ENOENT, 5, 5, 5, False, True),  # all that there was
        (Command.LOOKUP_AND_DELETE_BATCH, 0, 5, 9, 5, False, False),
    ],
)
def test_a_batch_counts_what_was_done(
    command: Command, result: int, asked: int, done: int, count: int, failed: bool, absent: bool
) -> None:
    """The kernel's own count is taken where it can be one."""
    found = write(record(command, result=result, flags=Flag.BATCH, asked=asked, done=done))
    assert (found.count, found.failed, found.absent) == (count, failed, absent)
    assert found.truncated == (count > 0)


@pytest.mark.parametrize(
    ("command", "result", "count", "failed", "absent"),
    [
        (Command.UPDATE, 0, 1, False, False),
        (Command.UPDATE, -E2BIG, 0, True, False),
        (Command.UPDATE, -ENOENT, 0, True, False),
        (Command.DELETE, -ENOENT, 0, False, True),
        (Command.LOOKUP_AND_DELETE, -ENOENT, 0, False, True),
        (Command.DELETE, -EFAULT, 0, True, False),
    ],
)
def test_a_single_call_has_its_entry(
    command: Command, result: int, count: int, failed: bool, absent: bool
) -> None:
    """The entry of a call that failed is there too."""
    found = write(record(command, result=result, copied=1, data=b"keysvv"))
    assert (found.count, found.failed, found.absent) == (count, failed, absent)
    assert found.entries == ((b"keys", b"vv"),)
    assert not found.truncated


def test_the_own_process_has_the_number_of_its_procfs(tmp_path: Path) -> None:
    """What procfs calls this process is its number; what is no procfs is refused, with a remedy."""
    assert kernel.own_number(Path("/proc")) == os.getpid()
    with pytest.raises(UnsupportedError) as refused:
        kernel.own_number(tmp_path)
    assert refused.value.remedy
    (tmp_path / "self").symlink_to("nobody")
    with pytest.raises(UnsupportedError):
        kernel.own_number(tmp_path)


@given(st.binary(max_size=300))
def test_any_bytes_decode(data: bytes) -> None:
    """Nothing is raised, and a buffer that is too short is no record."""
    assert decode(data) is None or len(data) >= HEAD.size


@given(
    st.sampled_from(Command),
    st.sampled_from([1, 2]),
    st.sampled_from([0, -ENOENT, -E2BIG]),
    st.integers(0, 15),
    st.tuples(*[st.integers(0, 9)] * 5),
    st.binary(max_size=99),
)
def test_any_record_tells_no_more_than_was_done(
    command: Command, kind: int, result: int, flags: int, counts: tuple[int, ...], data: bytes
) -> None:
    """No entry is made up, and none is told of that the kernel did not do, but the one that failed."""
    asked, done, copied, *sizes = counts
    found = decode(
        record(
            command,
            kind=kind,
            result=result,
            flags=flags,
            asked=asked,
            done=done,
            copied=copied,
            sizes=(sizes[0], sizes[1]),
            data=data,
        )
    )
    if isinstance(found, MapWrite):
        assert found.count <= max(asked, 1)
        assert sum(len(key) + len(value) for key, value in found.entries) <= len(data)
        assert found.truncated == (len(found.entries) < found.count)
        if flags & Flag.BATCH:
            assert len(found.entries) <= found.count
    elif kind == 2:
        assert found == Replacement(1, 2, 3, 4, command, result, "cil", 6)


@pytest.mark.parametrize(("command", "kind"), [(1, 1), (Command.LINK_UPDATE, 1), (Command.UPDATE, 3), (0, 0)])
def test_what_is_unknown_is_no_record(command: int, kind: int) -> None:
    """A command or kind that only a newer kernel side knows is refused, and so is what is cut."""
    assert decode(record(command, kind=kind)) is None
    assert decode(record(copied=2, data=bytes(11))) is None
    assert decode(record()[: struct.calcsize("=2I")]) is None
