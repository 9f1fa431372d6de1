# SPDX-License-Identifier: Apache-2.0
"""The ring buffer's records mean in Python what they mean in C, and no bytes harm the decoder."""

import re
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kptrace.dataplanes.nftables import batch
from kptrace.signals import rewrite_kernel, rewrite_outcome
from kptrace.signals.rewrite_records import HEAD, Flag, Kind, Transaction, decode
from tests.unit.c_layout import BPF, numbers, run

HEADER = "kptrace/rewrite.h"
SMALL = st.integers(0, 2**32 - 1)


def record(
    kind: int = Kind.FLAT,
    flags: int = 0,
    *,
    result: int = 0,
    queued: tuple[int, int] = (0, 0),
    parents: tuple[int, ...] = (0, 0, 0, 0),
    comm: bytes = b"nft",
    size: int = 0,
    tail: bytes = b"",
    copy: bytes = b"",
    copied: int | None = None,
) -> bytes:
    """A transaction's record as the kernel side hands it over."""
    head = HEAD.pack(
        *(kind, 10, 11, flags, 100, 200, result, 7, 1, 2, 3, 4, 5),
        *(*queued, 0, *parents, comm, size, tail, len(copy) if copied is None else copied, 0),
    )
    return head + copy


def transaction(data: bytes) -> Transaction:
    """The record's transaction, which it must have."""
    found = decode(data)
    assert isinstance(found, Transaction)
    return found


def test_a_transaction_is_read_as_c_writes_it(tmp_path: Path) -> None:
    """Every member of C's `struct rewrite_head` arrives under its own name."""
    made = run(
        tmp_path,
        HEADER,
        "struct rewrite_head head = { .kind = KIND_VECTOR, .tgid = 0x80000001, .tid = 3, .flags = FLAG_TAIL | FLAG_UNREAD,"
        " .begin_ns = 1ULL << 63, .end_ns = 5, .result = -6, .cgroup = 1ULL << 40, .netns = 8, .task_netns = 9,"
        " .mntns = 10, .sequence_begin = 11, .sequence_end = 0xffffffff, .queued_begin = 13, .queued_end = 17,"
        ' .error = -2, .parents = { 21, 22, 23, 24 }, .comm = "kube-proxy", .size = 4242,'
        ' .tail = "0123456789abcdefghi", .copied = 3, .zero = 0 };\n'
        "dump(head); putchar('x'); putchar('y'); putchar('z');",
    )
    assert decode(made) == Transaction(
        kind=Kind.VECTOR,
        tgid=0x80000001,
        tid=3,
        flags=Flag.TAIL | Flag.UNREAD,
        begin_ns=1 << 63,
        end_ns=5,
        result=-6,
        cgroup_id=1 << 40,
        netns=8,
        task_netns=9,
        mntns=10,
        sequence_begin=11,
        sequence_end=0xFFFFFFFF,
        answers=4,
        error=-2,
        parents=(21, 22, 23, 24),
        comm="kube-proxy",
        size=4242,
        tail=b"0123456789abcdefghi\0",
        data=b"xyz",
    )


def test_what_is_under_way_is_read_as_c_writes_it(tmp_path: Path) -> None:
    """C's `struct started`, the value of a map, unpacks into its members in order."""
    made = run(
        tmp_path,
        HEADER,
        "struct started it = { .begin_ns = 1, .sk = 2, .base = 3, .count = 4, .starts = 5, .kind = 6, .flags = 7,"
        " .sequence = 8, .queued = 9, .netns = 10, .zero = 11 }; dump(it);",
    )
    assert rewrite_kernel._STARTED.unpack(made) == tuple(range(1, 12))


def test_sizes_and_offsets_are_the_compilers(tmp_path: Path) -> None:
    """The compiler puts no padding where Python's formats, which have none, do not name it."""
    expected = {
        "sizeof(struct rewrite_head)": HEAD.size,
        "__builtin_offsetof(struct rewrite_record, data)": HEAD.size,
        "sizeof(struct started)": rewrite_kernel._STARTED.size,
        "__builtin_offsetof(struct rewrite_head, parents)": struct.calcsize("=4I2QqQ7Ii"),
        "__builtin_offsetof(struct rewrite_head, comm)": struct.calcsize("=4I2QqQ7Ii4I"),
        "__builtin_offsetof(struct rewrite_head, tail)": struct.calcsize("=4I2QqQ7Ii4I16sI"),
        "__builtin_offsetof(struct rewrite_head, copied)": struct.calcsize("=4I2QqQ7Ii4I16sI20s"),
    }
    assert numbers(tmp_path, HEADER, *expected) == expected


def test_constants_are_those_of_the_header(tmp_path: Path) -> None:
    """Kinds, flags, reasons of loss and the tail's length are the same numbers on both sides."""
    expected = {
        **{f"KIND_{kind.name}": kind.value for kind in Kind},
        **{f"FLAG_{flag.name}": flag.value for flag in Flag},
        **{f"LOST_{reason.upper()}": n for n, reason in enumerate(rewrite_kernel.LOST_REASONS)},
        "TAIL_BYTES": batch.TAIL_BYTES,
    }
    assert numbers(tmp_path, HEADER, *expected) == expected
    (answers,) = re.findall(
        r"^#define ANSWERS (\d+)$", (BPF / "include/kptrace/rewrite_socket.h").read_text(), re.MULTILINE
    )
    assert int(answers) == rewrite_outcome.ANSWERS_SEEN


@given(st.binary(max_size=400))
def test_any_bytes_decode(data: bytes) -> None:
    """Nothing is raised, and a buffer that is too short for a kind's number is no record."""
    found = decode(data)
    assert found is None or len(data) >= HEAD.size


@given(st.sampled_from(Kind), st.binary(max_size=400))
def test_any_bytes_of_a_known_kind_decode(kind: Kind, rest: bytes) -> None:
    """Behind a known kind's number any bytes give a record of that kind or none, and no copy exceeds the record."""
    found = decode(struct.pack("=I", kind) + rest)
    if isinstance(found, Transaction):
        assert found.kind is kind
        assert len(found.data) <= len(rest)
        assert found.size >= len(found.data)
        assert found.answers >= 0
    else:
        assert found is None


@pytest.mark.parametrize("kind", [0, 5, 7, 255, 1 << 31])
def test_an_unknown_kind_is_no_record(kind: int) -> None:
    """A kind that only a newer kernel side knows is refused, however long the record is."""
    assert decode(record(kind, copy=bytes(500))) is None


@pytest.mark.parametrize(
    "whole",
    [
        record(copy=b"copy"),
        record(Kind.REPLACE6, copy=bytes(92)),
    ],
    ids=["batch", "replacement"],
)
def test_a_cut_record_is_none(whole: bytes) -> None:
    """A record decodes whole, and no shorter part of it does."""
    assert decode(whole) is not None
    assert [size for size in range(len(whole)) if decode(whole[:size]) is not None] == []


def test_bytes_behind_the_copy_are_not_its() -> None:
    """Only as much as was copied is the batch's, whatever follows in the record."""
    assert transaction(record(copy=b"copyrest", copied=4)).data == b"copy"


@pytest.mark.parametrize(
    ("given_size", "result", "expected"),
    [
        (5000, 0, 5000),
        (0, 5000, 5000),
        (0, -12, 4),
        (0, 0, 4),
        (2, 0, 4),
        (0, 1, 4),
        (0xFFFFFFFF, 1, 0xFFFFFFFF),
    ],
)
def test_the_size_is_the_callers_or_the_results(given_size: int, result: int, expected: int) -> None:
    """What the caller gave is believed first, then the syscall's result; it is never less than what was copied."""
    assert transaction(record(Kind.VECTOR, size=given_size, result=result, copy=b"copy")).size == expected


def test_a_tail_counts_only_where_it_was_read() -> None:
    """Without its flag the field holds what an earlier record left there."""
    tail = bytes(range(1, 21))
    assert transaction(record(flags=Flag.TAIL, tail=tail)).tail == tail
    assert transaction(record(flags=Flag.OVERLAP, tail=tail)).tail == b""


@given(SMALL, SMALL)
def test_answers_are_never_negative(begin: int, end: int) -> None:
    """A sender that read from its socket meanwhile had no answer, not a negative number of them."""
    assert transaction(record(queued=(begin, end))).answers == max(0, end - begin)


def test_missing_ancestors_are_left_out() -> None:
    """Above the first process of all, and where the kernel could not tell, there is nobody."""
    assert transaction(record(parents=(5, 1, 0, 0))).parents == (5, 1)
    assert transaction(record(parents=(0, 0, 0, 0))).parents == ()


def test_names_end_at_a_nul_and_keep_odd_bytes_as_escapes() -> None:
    """What the name's buffer holds behind the NUL is another name's, and bytes that are no UTF-8 stay readable."""
    assert transaction(record(comm=b"nft\0xy-proxy")).comm == "nft"
    assert transaction(record(comm=b"\xff" * 16)).comm == r"\xff" * 16
    assert transaction(record(comm="köln".encode())).comm == "köln"


def test_unknown_flags_are_kept() -> None:
    """A flag of a newer kernel side does no harm to those that are known."""
    found = transaction(record(flags=Flag.SEVERAL | 1 << 31))
    assert found.flags & Flag.SEVERAL
    assert not found.flags & Flag.OVERLAP


@pytest.mark.parametrize("kind", [Kind.FLAT, Kind.VECTOR, Kind.REPLACE4, Kind.REPLACE6])
def test_batches_are_told_from_replacements(kind: Kind) -> None:
    """Flat and vector sends carry nf_tables batches, the setsockopts do not."""
    assert transaction(record(kind)).is_batch is (kind in (Kind.FLAT, Kind.VECTOR))
