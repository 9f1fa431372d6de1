# SPDX-License-Identifier: Apache-2.0
"""Calls in the order of any CPU become the same rewrites, whenever they are read."""

from collections.abc import Sequence
from errno import E2BIG, ENOENT

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kptrace.model.netfilter import DataPlane
from kptrace.model.rewrite import ObjectCount, Outcome, Rewrite
from kptrace.signals import map_write_bursts as bursts
from kptrace.signals.map_write_bursts import (
    ABSENT,
    CALLS,
    CUT,
    FAILED,
    GAP_NS,
    LONGEST_NS,
    MAX_OPEN,
    Bursts,
    first_begins,
)
from kptrace.signals.map_write_order import Call, InOrder
from kptrace.signals.map_write_records import Command, MapWrite, Replacement
from tests.unit.signals.map_write_story import MAPS, Arrival, arrivals, who, write

HOLD_NS = 20_000_000
FOREVER = 1 << 62


def feed(reducer: Bursts, call: Call) -> list[Rewrite]:
    """Hand a call over."""
    if isinstance(call, MapWrite):
        return reducer.write(call, MAPS[call.map])
    return reducer.replacement(call)


def reduced(calls: Sequence[Call]) -> list[Rewrite]:
    """The rewrites of calls in this order, and nothing after."""
    reducer = Bursts(who)
    found = [rewrite for call in calls for rewrite in feed(reducer, call)]
    return found + reducer.settle(FOREVER, {})


def known(rewrites: Sequence[Rewrite]) -> list[tuple[object, ...]]:
    """What identifies rewrites, and what they count."""
    found = [
        (
            *(each.run.tgid, each.table == "programs", each.begin_ns, each.end_ns, each.details[CALLS]),
            *(each.details.get(FAILED), each.details.get(ABSENT), each.objects, each.outcome, each.size),
        )
        for each in rewrites
    ]
    return sorted(found, key=repr)


def bounds(calls: Sequence[Call]) -> list[tuple[object, ...]]:
    """By a second way: where each process's rewrites begin and end, and how many calls they are."""
    found = []
    for tgid, programs in {(call.tgid, isinstance(call, Replacement)) for call in calls}:
        own = [call for call in calls if (call.tgid, isinstance(call, Replacement)) == (tgid, programs)]
        groups: list[list[Call]] = []
        for call in sorted(own, key=lambda call: (call.end_ns, call.tid)):
            last = groups[-1] if groups else []
            if (
                not last
                or call.begin_ns - max(each.end_ns for each in last) >= GAP_NS
                or call.end_ns - min(each.begin_ns for each in last) > LONGEST_NS
            ):
                groups.append([])
            groups[-1].append(call)
        for group in groups:
            begin, end = min(each.begin_ns for each in group), max(each.end_ns for each in group)
            found.append((tgid, programs, begin, end, str(len(group))))
    return sorted(found, key=repr)


def run(story: Sequence[Arrival], reads: Sequence[int]) -> tuple[list[Call], list[Rewrite]]:
    """What the signal makes of records that are read at these times: the calls it hands over, and the rewrites."""
    order, reducer = InOrder(), Bursts(who)
    handed: list[Call] = []
    rewrites: list[Rewrite] = []
    waiting = sorted(story, key=lambda each: each.at_ns)
    for now in [*sorted(reads), FOREVER]:
        # The kernel forgets a call when its record is there.
        under_way = [each.call for each in story if each.call.begin_ns <= now < each.at_ns]
        while waiting and waiting[0].at_ns <= now:
            arrived = waiting.pop(0)
            for _ in range(0 if arrived.lost else 1 + arrived.twice):
                order.put(arrived.call)
        until = now - HOLD_NS
        for call in order.until(until):
            handed.append(call)
            rewrites += feed(reducer, call)
        pending = first_begins((call.tgid, call.begin_ns) for call in [*under_way, *order.held()])
        rewrites += reducer.settle(until, pending)
    assert order.late == 0
    assert len(reducer) == 0
    return handed, rewrites


@given(arrivals(HOLD_NS), st.lists(st.integers(0, 4 * LONGEST_NS), max_size=12), st.data())
def test_rewrites_do_not_depend_on_when_records_are_read(
    story: list[Arrival], reads: list[int], data: st.DataObject
) -> None:
    """Records in any order, twice or lost, read at any times: every call once, in order, and the same rewrites."""
    near = [each.at_ns for each in story] + [each.call.end_ns + GAP_NS + HOLD_NS for each in story]
    reads += data.draw(st.lists(st.sampled_from(near), max_size=12))
    handed, rewrites = run(story, reads)
    there = sorted((each.call for each in story if not each.lost), key=lambda call: (call.end_ns, call.tid))
    assert handed == there
    assert known(rewrites) == known(reduced(there))
    assert [each[:5] for each in known(rewrites)] == bounds(there)


@given(arrivals(HOLD_NS))
def test_nothing_is_counted_twice_or_left_out(story: list[Arrival]) -> None:
    """Over all rewrites of a process, the calls, failures, bytes and entries are those of its calls."""
    calls = sorted((each.call for each in story), key=lambda call: call.end_ns)
    rewrites = reduced(calls)
    writes = [call for call in calls if isinstance(call, MapWrite)]
    programs = [call for call in calls if isinstance(call, Replacement)]
    assert sum(int(each.details[CALLS]) for each in rewrites) == len(calls)
    assert sum(int(each.details.get(FAILED, 0)) for each in rewrites) == sum(call.failed for call in calls)
    assert sum(int(each.details.get(ABSENT, 0)) for each in rewrites) == sum(call.absent for call in writes)
    assert sum(each.size for each in rewrites) == sum(call.size for call in writes)
    for kind, expected in {
        "map_entry": sum(call.count for call in writes),
        "program": sum(not call.failed for call in programs),
    }.items():
        assert expected == sum(
            found.count for each in rewrites for found in each.objects if found.object == kind
        )
    for each in rewrites:
        assert (each.outcome is Outcome.COMMITTED) == bool(each.objects)
        assert each.writer == f"w{each.run.tgid}"


def test_a_rewrite_tells_what_changed() -> None:
    """The change of one Service: its begin and end, what was written where, and the bytes."""
    calls = [
        write(100, 200, map_=1),
        write(300, 400, map_=2, command=Command.DELETE, result=-ENOENT),
        write(500, 900, map_=1, command=Command.UPDATE_BATCH, asked=7, count=3, result=-E2BIG),
        write(950, 990, map_=1, command=Command.DELETE),
    ]
    assert reduced(calls) == [
        Rewrite(
            dataplane=DataPlane.CILIUM,
            family="inet",
            table="~several",
            writer="w10",
            run=who(10)[0],
            begin_ns=100,
            end_ns=990,
            size=24 * 10,
            outcome=Outcome.COMMITTED,
            objects=(
                ObjectCount("ipv4", "lb4_services_v2", "map_entry", "add", 4),
                ObjectCount("ipv4", "lb4_services_v2", "map_entry", "delete", 1),
            ),
            details={CALLS: "4", FAILED: "1", ABSENT: "1"},
        )
    ]


@pytest.mark.parametrize(
    ("results", "outcome"),
    [
        ([-E2BIG, -E2BIG], Outcome.FAILED),
        ([-E2BIG, -ENOENT], Outcome.FAILED),
        ([-ENOENT, -ENOENT], Outcome.EMPTY),
        ([-E2BIG, 0], Outcome.COMMITTED),
        ([-ENOENT, 0], Outcome.COMMITTED),
    ],
)
def test_outcomes(results: list[int], outcome: Outcome) -> None:
    """What changed something is committed; what changed nothing is failed if the kernel refused something."""
    calls = [write(n, n + 1, command=Command.DELETE, result=result) for n, result in enumerate(results)]
    (found,) = reduced(calls)
    assert found.outcome is outcome
    assert (found.family, found.table) == ("ipv4", "lb4_services_v2")


def test_a_pause_ends_a_rewrite() -> None:
    """Ten milliseconds from one call's end to the next one's begin are a pause, less is none."""
    assert len(reduced([write(0, 5), write(GAP_NS + 4, GAP_NS + 5)])) == 1
    assert len(reduced([write(0, 5), write(GAP_NS + 5, GAP_NS + 6)])) == 2
    # A long call is no pause.
    assert len(reduced([write(0, 5), write(6, 3 * GAP_NS), write(3 * GAP_NS, 3 * GAP_NS + 1)])) == 1


def test_what_is_under_way_keeps_a_rewrite_open() -> None:
    """A load that takes a second belongs to the burst that it began in, and other processes do not wait for it."""
    reducer = Bursts(who)
    feed(reducer, Replacement(0, 5, 10, 10, Command.PROGRAM_LOAD, 0, "a", 1))
    feed(reducer, write(0, 5, tgid=11))
    (other,) = reducer.settle(50 * GAP_NS, {10: 6, 11: GAP_NS + 5})
    assert other.run.tgid == 11
    assert feed(reducer, Replacement(6, 60 * GAP_NS, 10, 10, Command.LINK_UPDATE, 0, "a", 1)) == []
    (found,) = reducer.settle(61 * GAP_NS, {})
    assert (found.begin_ns, found.end_ns, found.table, found.family) == (0, 60 * GAP_NS, "programs", "inet")
    assert [(each.object, each.operation) for each in found.objects] == [
        ("program", "load"),
        ("program", "replace"),
    ]


def test_a_writer_that_never_pauses_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """No rewrite is longer than a minute or has more than so many calls; the cut is said."""
    step = GAP_NS // 2
    calls = [write(at, at + 1) for at in range(0, 2 * LONGEST_NS + 10 * step, step)]
    found = reduced(calls)
    assert [each.details.get(CUT) for each in found] == ["1", "1", None]
    assert all(each.end_ns - each.begin_ns <= LONGEST_NS for each in found)
    monkeypatch.setattr(bursts, "MOST_CALLS", 7)
    found = reduced([write(at, at + 1) for at in range(20)])
    assert [each.details[CALLS] for each in found] == ["7", "7", "6"]


def test_a_process_that_vanished_in_a_call_is_not_waited_for() -> None:
    """What seems to be under way for ever ends after a minute."""
    reducer = Bursts(who)
    feed(reducer, write(0, 5))
    assert reducer.settle(LONGEST_NS, {10: 6}) == []
    assert len(reducer.settle(LONGEST_NS + 1, {10: 6})) == 1


def test_open_rewrites_are_bounded() -> None:
    """However many processes write at once, only so many rewrites are open."""
    reducer = Bursts(who)
    found = [rewrite for tgid in range(1, 400) for rewrite in feed(reducer, write(tgid, 500, tgid=tgid))]
    assert len(reducer) == MAX_OPEN
    assert [each.run.tgid for each in found] == list(range(1, 400 - MAX_OPEN))


def test_a_late_call_is_counted() -> None:
    """What comes after it was too late is handed over all the same, and said."""
    order = InOrder()
    order.put(write(0, 50))
    assert len(list(order.until(60))) == 1
    order.put(write(0, 40, tid=3))
    assert order.late == 1
    assert [call.end_ns for call in order.until(60)] == [40]
