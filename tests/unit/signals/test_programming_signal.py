# SPDX-License-Identifier: Apache-2.0
"""From differences, rewrites and runs to metrics and /status: what the daemon wires together, with nothing real in it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from kptrace.identity.differences import Difference, Programmed
from kptrace.identity.eligible import Wanted
from kptrace.model.metrics import HistogramSample, Sample
from kptrace.model.netfilter import DataPlane
from kptrace.model.rewrite import Outcome, ProcessRun, Rewrite
from kptrace.model.signal import State as Health
from kptrace.signals.programming_signal import ABSENT_NS, MAX_WAITING, ProgrammingSignal
from kptrace.signals.sync_events import Sync
from tests.unit.signals.programming_story import MS, V4, WEB

EPOCH = 1_700_000_000_000_000_000


@dataclass
class Node:
    """A node whose legacy iptables kube-proxy writes: there only time tells.

    Attributes:
        began: beginnings of runs under way, by transaction (its end in ms).
        running: the same by class of writer.
    """

    listed: bool = True
    name: str = "here"
    lost: int = 0
    replaced: bool = False
    now_ns: int = 0
    began: dict[int, int] = field(default_factory=dict)
    runs: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Nothing happened yet."""
        self.signal = ProgrammingSignal(
            self,
            lambda: self.listed,
            node=self.name,
            lost=lambda: self.lost,
            replaced=lambda: self.replaced,
            clock=lambda: self.now_ns,
            unix=lambda at: EPOCH + at,
        )

    def began_ns(self, rewrite: Rewrite) -> int | None:
        """See `programming_signal.Runs`."""
        return self.began.get(rewrite.end_ns // MS)

    def running(self) -> Mapping[str, int]:
        """See `programming_signal.Runs`."""
        return self.runs

    def change(self, at: int, before: str, after: str, *, late: bool = False, trigger: int = 0) -> None:
        """The Service's endpoints 10.0.0.N are other ones at `at` ms."""
        self.signal.difference(Difference(_state(before), _state(after), at * MS, trigger, late))

    def commit(self, end: int, *, writer: str = "kube-proxy", family: str = "ipv4") -> Rewrite:
        """The `nat` table was replaced at `end` ms."""
        made = Rewrite(
            DataPlane.IPTABLES_LEGACY,
            family,
            "nat",
            writer,
            ProcessRun(7),
            (end - 1) * MS,
            end * MS,
            1,
            Outcome.COMMITTED,
        )
        self.signal.written(made, b"")
        return made

    def settle(self, until: int) -> None:
        """Everything up to `until` ms is known."""
        self.now_ns = until * MS
        self.signal.settled(until * MS)

    def section(self) -> dict[str, Any]:
        """What /status says of it."""
        found: Any = self.signal.status(names=True)["programming"]
        return dict(found)

    def value(self, name: str) -> float:
        """The sum of a metric's samples; the number of observations of a histogram."""
        (family,) = [each for each in self.signal.families() if each.spec.name == name]
        return sum(
            each.value if isinstance(each, Sample) else each.buckets[-1][1]
            for each in family.samples
            if isinstance(each, Sample | HistogramSample)
        )

    def state(self) -> tuple[Health, str]:
        """Its state and reason."""
        (row,) = self.signal.states()
        return row.state, row.reason


def _state(ends: str) -> Programmed:
    endpoints = frozenset((f"10.0.0.{n}", 8080) for n in ends.split())
    return {(WEB, V4): Wanted(frozenset({("10.96.0.1", 80)}), endpoints)}


def sync(begin: int, end: int, *commits: Rewrite, outcome: Outcome = Outcome.COMMITTED) -> Sync:
    """A run of kube-proxy."""
    return Sync("iptables-legacy", "ipv4", "kube-proxy", 5, begin * MS, end * MS, outcome, {}, commits)


def test_a_change_is_pending_until_its_commit() -> None:
    """It is one sample, of the time between; what is pending is shown meanwhile."""
    node = Node()
    node.change(1000, "1", "1 2", trigger=EPOCH)
    node.settle(1500)
    assert node.section() | {"pending": 1, "oldest pending seconds": 0.5} == node.section()
    assert node.value("kptrace_programming_pending") == 1
    assert node.value("kptrace_programming_oldest_pending_seconds") == 0.5
    node.began[1800] = 1700 * MS
    node.commit(1800)
    assert node.section()["programmed"] == 0  # not before all runs are known
    node.settle(2600)
    assert node.section() | {"pending": 0, "programmed": 1, "by time (inferred)": 1} == node.section()
    assert node.value("kptrace_programming_duration_seconds") == 1
    assert node.value("kptrace_programming_since_trigger_seconds") == 1
    assert node.value("kptrace_programming_changes_total") == 1
    (row,) = node.signal.status(names=True)["changes"]  # type: ignore[misc]  # a list
    assert row == {
        "change": "endpoint_added",
        "family": "ipv4",
        "service": "demo/web:http/tcp",
        "address": "10.0.0.2:8080",
        "fate": "programmed",
        "received": (EPOCH + 1000 * MS) / 1e9,
        "dataplane": "iptables-legacy",
        "committed": (EPOCH + 1800 * MS) / 1e9,
        "ms": 800.0,
        "attribution": "inferred",
    }
    (row,) = node.signal.status(names=False)["changes"]  # type: ignore[misc]  # a list
    assert not {"service", "address"} & row.keys()


def test_a_run_that_is_over_before_it_is_asked_for_is_remembered() -> None:
    """Two runs between two readings: the first one's beginning is known by then only from its end."""
    node = Node()
    node.change(1000, "1", "1 2")
    first = node.commit(1005)
    node.signal.synced(sync(990, 1006, first))
    node.began[1050] = 1020 * MS
    node.commit(1050)
    node.settle(1500)
    assert node.value("kptrace_programming_duration_seconds") == 1
    (row,) = node.signal.status(names=True)["changes"]  # type: ignore[misc]  # a list
    assert row["ms"] == 50.0  # the first run had begun before the change was there


def test_a_transaction_waits_until_its_time_is_settled() -> None:
    """What ended after the time up to which all is known is kept for the next time."""
    node = Node()
    node.change(1000, "1", "2")
    node.began[1600] = 1550 * MS
    node.commit(1600)
    node.settle(1500)
    assert node.value("kptrace_programming_duration_seconds") == 0
    node.settle(2000)
    assert node.value("kptrace_programming_duration_seconds") == 2  # one came, one went


def test_only_kube_proxys_transactions_count() -> None:
    """Somebody else's table is none of it, in whatever run."""
    node = Node()
    node.change(1000, "1", "1 2")
    node.commit(1800, writer="other")
    node.settle(2600)
    assert node.section()["pending"] == 1


def test_a_run_that_failed_keeps_what_it_may_have_had() -> None:
    """A commit that began before the event was it only if the run succeeded."""
    node = Node()
    node.began[1010] = 990 * MS
    node.change(1000, "1", "1 2")
    commit = node.commit(1010)
    node.signal.synced(sync(990, 1020, commit, outcome=Outcome.FAILED))
    node.settle(1500)
    node.settle(9000)
    assert node.section()["pending"] == 1
    node.began[9500] = 9400 * MS
    node.commit(9500)
    node.settle(10_000)
    assert node.section()["programmed"] == 1


def test_without_another_run_the_last_one_was_it() -> None:
    """After 5 s without one; a run that is under way is waited for."""
    node = Node()
    node.began[1010] = 990 * MS
    node.change(1000, "1", "1 2")
    node.commit(1010)
    node.settle(2000)
    node.runs["kube-proxy"] = 1500 * MS
    node.settle(8000)
    assert node.section()["pending"] == 1
    node.runs.clear()
    node.settle(9000)
    assert node.section()["programmed"] == 1


def test_what_is_told_late_is_counted_and_never_timed() -> None:
    """A list after the first one, or what a broken watch had missed."""
    node = Node()
    node.change(1000, "1", "1 2", late=True)
    node.began[1800] = 1700 * MS
    node.commit(1800)
    node.settle(2600)
    assert node.section() | {"pending": 0, "programmed": 0, "unmeasured": 1} == node.section()
    assert node.value("kptrace_programming_changes_total") == 1


def test_lost_transactions_end_what_is_pending() -> None:
    """It may be true already: it is counted as unmeasured, and later changes are measured again."""
    node = Node()
    node.change(1000, "1", "1 2")
    node.lost = 1
    node.settle(1500)
    assert node.section() | {"pending": 0, "unmeasured": 1} == node.section()
    node.change(2000, "1 2", "1 2 3")
    node.settle(2500)
    assert node.section()["pending"] == 1


def test_more_transactions_than_can_wait_are_lost_ones() -> None:
    """There is a bound, and what is beyond it is counted."""
    node = Node()
    node.change(0, "1", "1 2")
    for number in range(MAX_WAITING + 2):
        node.commit(1000 + number)
    assert node.signal.losses() == {("programming", "rewrite_forgotten"): 2}
    assert node.section()["unmeasured"] == 1


@pytest.mark.parametrize(
    ("listed", "name", "expected"),
    [
        (False, "here", (Health.DEGRADED, "starting")),
        (True, "", (Health.DEGRADED, "no_node_name")),
        (True, "here", (Health.ACTIVE, "ok")),
    ],
)
def test_the_state_says_what_is_missing(listed: bool, name: str, expected: tuple[Health, str]) -> None:
    """Not everything is listed yet; without a node's name nothing is local and there is no zone."""
    assert Node(listed, name).state() == expected


def test_a_node_without_kube_proxy_says_so() -> None:
    """Changes that stay pending although kube-proxy was never seen; one commit of it is enough to know better."""
    node = Node()
    node.change(0, "1", "1 2")
    node.settle(1000)
    assert node.state()[1] == "ok"
    node.settle(1000 + ABSENT_NS // MS)
    assert node.state() == (Health.DEGRADED, "no_kube_proxy")
    node.commit(62_000, family="ipv6")
    node.settle(63_000)
    assert node.state()[1] == "ok"


def test_where_another_writer_programs_services_nothing_is_told_of_kube_proxy() -> None:
    """Changes are let go after a minute, and no sample is there, until kube-proxy is seen to commit: then both are here."""
    node = Node(replaced=True)
    node.change(1000, "1", "1 2")
    node.settle(2600)
    assert node.state() == (Health.OFF, "replaced")
    assert list(node.signal.families()) == []
    assert node.section()["pending"] == 1
    node.settle(62_000)
    node.settle(63_500)
    assert node.section() | {"pending": 0, "unmeasured": 1} == node.section()
    node.change(70_000, "1 2", "1 2 3")
    node.began[71_000] = 70_500 * MS
    node.commit(71_000)
    node.settle(72_000)
    assert node.state() == (Health.ACTIVE, "ok")
    assert node.value("kptrace_programming_duration_seconds") == 1
