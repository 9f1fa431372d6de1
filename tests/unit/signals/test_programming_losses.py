# SPDX-License-Identifier: Apache-2.0
"""What is told twice, late, by a list, or not at all; what is too much; what never comes."""

import pytest

from kptrace.dataplanes.nftables.services import ServiceBatch
from tests.unit.signals.programming_story import (
    ADDED,
    API,
    REMOVED,
    V4,
    V6,
    WEB,
    Watch,
    change,
    commit,
    holds,
    names,
)

A, B, C = "10.0.0.1", "10.0.0.2", "10.0.0.3"


def test_the_same_twice_is_once() -> None:
    """Changes and commits, before and after they met."""
    watch = Watch()
    told = change(100), commit(101, 150, holds(WEB, A))
    assert watch.tell(told[0], told[0], change(90), *told, *told, change(100)) == ["programmed 50 exact"]
    assert watch.changes == 1


def test_an_older_opposite_told_late_is_superseded() -> None:
    """The endpoint came and went; we heard of its going first."""
    watch = Watch()
    watch.tell(change(110, REMOVED), commit(111, 150, holds(WEB)))
    assert watch.tell(change(100, ADDED)) == ["superseded"]
    assert watch.balanced()


def test_a_list_neither_invents_nor_drops_pending_changes() -> None:
    """What was missed is counted and not measured; what is undone is superseded; what is confirmed stays."""
    watch = Watch()
    watch.tell(change(100, ip=A), change(100, ip=B))
    missed = [change(60_000, REMOVED, B), change(60_000, ip=C), change(60_000, ip=A)]
    watch.changes += watch.correlator.relisted(missed)
    assert watch.fates() == ["superseded", "superseded", "unmeasured relisted"]
    assert watch.tell(commit(60_001, 60_100, holds(WEB, A, C))) == ["programmed 60000 exact"]
    assert watch.balanced()


@pytest.mark.parametrize(("method", "reason"), [("lost", "events_lost"), ("reset", "reset")])
def test_what_may_have_been_missed_is_given_up(method: str, reason: str) -> None:
    """Commits that nobody told of, or a watch that ended; afterwards all is as before."""
    watch = Watch()
    watch.tell(commit(60, 80, holds(WEB, A)), change(200, ip=B))
    getattr(watch.correlator, method)()
    assert watch.fates() == [f"unmeasured {reason}"]
    assert watch.tell(change(300, ip=A), commit(301, 320, holds(WEB, A))) == ["programmed 20 exact"]
    assert watch.balanced()


def test_beyond_the_limit_changes_are_counted() -> None:
    """And not kept."""
    watch = Watch(limit=2)
    watch.tell(*(change(100, ip=f"10.0.0.{n}") for n in range(5)))
    assert watch.fates() == ["unmeasured overflow"] * 3
    assert len(watch.correlator) == 2
    assert watch.correlator.ages()[V4].count == 2
    assert watch.correlator.ages()[V6].count == 0
    assert watch.balanced()


@pytest.mark.parametrize("told", [holds(WEB), holds(API), names(API)])
def test_what_no_run_writes_for_five_minutes_is_given_up(told: ServiceBatch) -> None:
    """We and kube-proxy differ about it, or its commit was lost: no figure is made up of the next full sync."""
    watch = Watch()
    watch.tell(change(100))
    assert watch.tell(commit(300_099, 300_200, told)) == []
    assert watch.tell(commit(300_100, 300_200, told)) == ["unmeasured not_programmed"]
