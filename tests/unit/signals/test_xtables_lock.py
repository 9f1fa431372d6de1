# SPDX-License-Identifier: Apache-2.0
"""The xtables lock's records and counts."""

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kptrace.model.metrics import HistogramSample, MetricSpec
from kptrace.signals.xtables_lock_kernel import LOST_REASONS
from kptrace.signals.xtables_lock_records import ATTEMPT, REPEAT_NS, STATE, Kind, LockState, decode
from kptrace.signals.xtables_lock_reduce import MAX_FILES, MAX_NAMED, SPECS, LockCounts, still_waiting
from tests.unit.c_layout import BPF, numbers

WATCHED, POD = 7, 8
WAIT = LockState(Kind.TAKEN, 10, 11, WATCHED, 0xFFFF888000000000, 25, 99, (2, 1), 1000, 3000)
HOLD = replace(WAIT, kind=Kind.HOLD, begin_ns=3000, end_ns=8000)


class Classes:
    """Names processes by their id, and remembers who was asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __call__(self, state: LockState) -> str:
        """The name of a state's process."""
        self.asked.append(state.tgid)
        return f"w{state.tgid}"


def values(
    counts: LockCounts, waits: Iterable[LockState] = (), holds: Iterable[LockState] = (), now: int = 0
) -> dict[str, dict[str, float]]:
    """Every family's values, or counts, by writer."""
    return {
        family.spec.name.removeprefix("kptrace_xtables_lock_").removesuffix("_seconds"): {
            sample.labels[0]: sample.count if isinstance(sample, HistogramSample) else sample.value
            for sample in family.samples
        }
        for family in counts.families(waits, holds, now)
    }


def pack(state: LockState) -> bytes:
    """A record as the kernel side writes it."""
    parents = (*state.parents, 0, 0, 0, 0)[:4]
    head = (state.kind, state.tgid, state.tid, state.netns, state.file, state.inode, state.device)
    return STATE.pack(*head, *parents, 0, state.begin_ns, state.end_ns)


def test_a_record_decodes_to_what_was_packed() -> None:
    """Every field has its place; what is cut, or of an unknown kind, is nothing."""
    assert decode(pack(WAIT)) == WAIT
    assert decode(pack(HOLD) + b"more") == HOLD
    assert decode(pack(WAIT)[:-1]) is None
    assert decode(b"\x09" + pack(WAIT)[1:]) is None


def test_layouts_and_constants_are_the_headers(tmp_path: Path) -> None:
    """The compiler's structures are those of the formats, and numbers are the same on both sides."""
    members = ("tgid", "netns", "file", "inode", "device", "parents", "begin_ns", "end_ns")
    expected = {
        "sizeof(struct lock_state)": STATE.size,
        "sizeof(struct attempt_key)": ATTEMPT.size,
        **{
            f"__builtin_offsetof(struct lock_state, {member})": at
            for member, at in zip(members, (4, 12, 16, 24, 32, 36, 56, 64), strict=True)
        },
        "LOCK_TAKEN": Kind.TAKEN,
        "LOCK_RELEASED": Kind.HOLD,
        **{f"LOST_{reason.upper()}": n for n, reason in enumerate(LOST_REASONS)},
    }
    assert numbers(tmp_path, "kptrace/xtables_lock.h", *expected) == expected
    (repeat,) = re.findall(
        r"^#define REPEAT_NS (\d+)", (BPF / "xtables_lock.bpf.c").read_text(), re.MULTILINE
    )
    assert int(repeat) == REPEAT_NS


def test_a_hold_has_the_class_that_its_process_had_when_it_began() -> None:
    """The class is asked for once, when the lock is taken: at the release the process may be gone."""
    classes = Classes()
    counts = LockCounts(WATCHED, classes)
    counts.apply(WAIT)
    counts.apply(HOLD)
    assert classes.asked == [10]
    found = values(counts)
    assert found["wait"] == {"w10": 1} == found["held"]
    sums = {
        family.spec.name: sample.sum
        for family in counts.families((), (), 0)
        for sample in family.samples
        if isinstance(sample, HistogramSample)
    }
    assert sums == {
        "kptrace_xtables_lock_wait_seconds": 2e-6,
        "kptrace_xtables_lock_held_seconds": 5e-6,
    }


def test_a_wait_that_was_seen_has_its_class_already() -> None:
    """Who was named while it waited keeps the name, though it is gone when its record comes."""
    classes = Classes()
    counts = LockCounts(WATCHED, classes)
    counts.see([replace(WAIT, kind=Kind.WAITING, end_ns=0)])
    counts.apply(WAIT)
    counts.apply(HOLD)
    assert classes.asked == [10]
    assert values(counts)["held"] == {"w10": 1}
    assert counts._named == {}


def test_a_hold_whose_taking_was_lost_still_counts() -> None:
    """A release names the process itself where nothing was known before."""
    counts = LockCounts(WATCHED, Classes())
    counts.apply(HOLD)
    assert values(counts)["held"] == {"w10": 1}
    assert values(counts)["wait"] == {}


def test_the_edge_belongs_to_its_bucket() -> None:
    """Ten microseconds are `le` 1e-05; there are 16 buckets."""
    counts = LockCounts(WATCHED, Classes())
    counts.apply(replace(HOLD, end_ns=HOLD.begin_ns + 10_000))
    counts.apply(replace(HOLD, end_ns=HOLD.begin_ns + 10_001))
    (sample,) = counts.families((), (), 0)[1].samples
    assert isinstance(sample, HistogramSample)
    assert len(sample.buckets) == 16
    assert sample.buckets[:2] == ((1e-5, 1), (1e-4, 2))


def test_a_pods_own_lock_does_not_count() -> None:
    """A lock file counts from the moment on that somebody in the watched namespace uses it, whoever holds it then."""
    counts = LockCounts(WATCHED, Classes())
    pod = replace(WAIT, netns=POD, tgid=20)
    counts.apply(pod)
    counts.apply(replace(pod, inode=98))
    assert values(counts)["wait"] == {}
    counts.apply(WAIT)
    counts.apply(replace(pod, end_ns=4000))
    counts.apply(replace(pod, inode=98))
    assert values(counts)["wait"] == {"w10": 1, "w20": 1}


def test_the_host_s_lock_counts_from_the_start() -> None:
    """A lock file that is known beforehand counts for whoever takes it."""
    counts = LockCounts(WATCHED, Classes(), [(25, 99)])
    counts.apply(replace(WAIT, netns=POD))
    assert values(counts)["wait"] == {"w10": 1}


def test_gauges_are_the_longest_of_each_class_and_else_0() -> None:
    """A class that was seen has a value of 0 when it neither waits nor holds."""
    counts = LockCounts(WATCHED, Classes())
    waits = [
        replace(WAIT, kind=Kind.WAITING, tgid=5, file=file, begin_ns=begin, end_ns=0)
        for file, begin in ((1, 500), (2, 900))
    ]
    counts.apply(WAIT)
    assert values(counts, waits, [HOLD], 4000) == {
        "wait": {"w10": 1},
        "held": {},
        "current_hold": {"w10": 1e-6},
        "longest_wait": {"w10": 0},  # those that wait have no name yet
    }
    counts.see(waits)
    assert values(counts, waits, [], 4000)["longest_wait"] == {"w10": 0, "w5": 3.5e-6}
    assert values(counts, [], [], 4000)["current_hold"] == {"w10": 0}


def test_a_failed_attempt_is_a_wait_until_it_is_too_old() -> None:
    """Between two attempts a process waits; after three seconds without another it does not."""
    inside = replace(WAIT, kind=Kind.WAITING, end_ns=0)
    attempt = replace(WAIT, kind=Kind.WAITING, file=3)
    assert still_waiting([inside], [attempt], 3000 + REPEAT_NS - 1) == [inside, attempt]
    assert still_waiting([inside], [attempt], 3000 + REPEAT_NS) == [inside]


def test_what_is_remembered_is_bounded() -> None:
    """Neither files nor names grow without an end, whatever others do."""
    counts = LockCounts(WATCHED, Classes())
    for number in range(2 * MAX_NAMED):
        counts.apply(replace(WAIT, inode=number, file=number))
    assert len(counts._named) == MAX_NAMED
    assert len(counts._files) == MAX_FILES
    assert values(counts)["wait"] == {"w10": 2 * MAX_NAMED}


@given(
    st.lists(
        st.builds(
            LockState,
            kind=st.sampled_from([Kind.TAKEN, Kind.HOLD]),
            tgid=st.integers(1, 4),
            tid=st.just(1),
            netns=st.just(WATCHED),
            file=st.integers(1, 3),
            device=st.just(1),
            inode=st.integers(1, 2),
            parents=st.just(()),
            begin_ns=st.integers(0, 1 << 40),
            end_ns=st.integers(1 << 40, 1 << 50),
        )
    )
)
def test_every_record_is_counted_once(records: list[LockState]) -> None:
    """Whatever comes in whatever order, counts add up to the records."""
    counts = LockCounts(WATCHED, Classes())
    for record in records:
        counts.apply(record)
    found = values(counts)
    for name, kind in (("wait", Kind.TAKEN), ("held", Kind.HOLD)):
        assert sum(found[name].values()) == sum(record.kind is kind for record in records)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_every_family_has_the_writer_as_its_label(spec: MetricSpec) -> None:
    """The dictionary of metrics gives these one label."""
    assert spec.labels == ("writer",)
