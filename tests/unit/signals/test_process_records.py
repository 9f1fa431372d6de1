# SPDX-License-Identifier: Apache-2.0
"""Records of processes mean in Python what they mean in C, and no bytes harm the decoder."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kptrace.signals import process_kernel, process_records
from kptrace.signals.process_records import EXEC, EXIT, Exec, Exit, Kind, decode
from tests.unit.c_layout import numbers, run

HEADER = "kptrace/process.h"
BODY = (
    "struct exec_record record = { .kind = PROCESS_EXEC, .tgid = 0x80000001, .at_ns = 1ULL << 63,"
    " .cgroup = 1ULL << 40, .parents = { 21, 22, 0, 0 }, .netns = 8, .mntns = 0xffffffff, .copied = %d,"
    ' .comm = "nft", .arguments = "nft\\0-f\\0-" };\n'
    'char *name = (char *)record.name, *path = "/usr/sbin/nft";\n'
    "for (int i = 0; path[i]; i++) name[i] = path[i];\n"
)


def test_an_exec_is_read_as_c_writes_it(tmp_path: Path) -> None:
    """Every member of C's `struct exec_record` arrives under its own name."""
    assert decode(run(tmp_path, HEADER, BODY % 9 + "dump(record);")) == Exec(
        tgid=0x80000001,
        at_ns=1 << 63,
        cgroup_id=1 << 40,
        parents=(21, 22),
        netns=8,
        mntns=0xFFFFFFFF,
        comm="nft",
        filename="/usr/sbin/nft",
        arguments=("nft", "-f", "-"),
    )


def test_without_arguments_the_record_is_shorter(tmp_path: Path) -> None:
    """As the kernel side sends it."""
    whole = run(tmp_path, HEADER, BODY % 0 + "dump(record);")
    found = decode(whole[: len(whole) - process_records.ARGUMENT_BYTES])
    assert isinstance(found, Exec)
    assert found.arguments is None


def test_an_exit_is_read_as_c_writes_it(tmp_path: Path) -> None:
    """The status is that of wait(2)."""
    body = "struct exit_record record = { .kind = PROCESS_EXIT, .tgid = 7, .at_ns = 9, .status = 0x8b };\ndump(record);"
    assert decode(run(tmp_path, HEADER, body)) == Exit(7, 9, 139)


def test_sizes_and_numbers_are_those_of_c(tmp_path: Path) -> None:
    """One side does not change without the other."""
    found = numbers(
        tmp_path,
        HEADER,
        "sizeof(struct exec_record)",
        "sizeof(struct exit_record)",
        "PROCESS_ARGUMENT_BYTES",
        "PROCESS_LOST_KINDS",
        "PROCESS_EXEC",
        "PROCESS_EXIT",
    )
    assert list(found.values()) == [
        EXEC.size + process_records.ARGUMENT_BYTES,
        EXIT.size,
        process_records.ARGUMENT_BYTES,
        len(process_kernel.LOST_REASONS),
        Kind.EXEC,
        Kind.EXIT,
    ]


@pytest.mark.parametrize(
    ("raw", "arguments"),
    [
        (b"nft\0-f\0-\0", ("nft", "-f", "-")),
        (b"nft\0list ta", ("nft", "list ta")),
        (b"nft\0\0x\0", ("nft", "", "x")),
        (b"\xff\0", ("\\xff",)),
    ],
)
def test_arguments_end_at_their_zeros(raw: bytes, arguments: tuple[str, ...]) -> None:
    """The last one may be cut, any may be empty, and none need be text."""
    head = EXEC.pack(Kind.EXEC, *(0,) * 9, len(raw), 0, b"nft", b"/nft")
    found = decode(head + raw)
    assert isinstance(found, Exec)
    assert (found.arguments, found.parent, found.parents) == (arguments, 0, ())


@given(st.binary(max_size=400), st.sampled_from([b"", b"\1\0\0\0", b"\2\0\0\0", b"\3\0\0\0"]))
def test_no_bytes_harm(data: bytes, kind: bytes) -> None:
    """A cut or unknown record is none."""
    found = decode(kind + data)
    assert found is None or len(kind + data) >= EXIT.size
