# SPDX-License-Identifier: Apache-2.0
"""From records to metrics: who is taken in, in which order, and what scrapes see."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from kptrace.kernel.host import Host
from kptrace.model.metrics import HistogramSample, Sample
from kptrace.model.netfilter import DataPlane
from kptrace.model.rewrite import Outcome, ProcessRun, Rewrite
from kptrace.signals.process_records import Exec, Exit
from kptrace.signals.processes import ProcessTable
from kptrace.signals.sync_events import Phase, Sync
from kptrace.signals.sync_signal import SyncSignal
from kptrace.signals.writers import Writers

HERE, ELSEWHERE = 10, 11
MS = 1_000_000
PROXY = 20


@dataclass
class Node:
    """A signal on a node where kube-proxy has been running for long.

    Attributes:
        proc: where its processes are.
        now_ns: CLOCK_MONOTONIC.
        lost: records that never came.
        syncs: what came out.
    """

    proc: Path
    now_ns: int = 0
    lost: int = 0
    syncs: list[Sync] = field(default_factory=list)

    def __post_init__(self) -> None:
        """kube-proxy is found in procfs."""
        old = {PROXY: ProcessRun(PROXY, 1, executable="/usr/local/bin/kube-proxy")}
        self.table = ProcessTable(old.get)
        self.signal = SyncSignal(
            HERE,
            lambda: self.table,
            Writers(),
            Host(proc=self.proc),
            self.syncs.append,
            lambda: {"ring_full": self.lost},
            lambda: self.now_ns,
        )

    def begin(self, tgid: int, at: int, command: str, netns: int = HERE) -> None:
        """kube-proxy starts a process."""
        words = tuple(command.split())
        path = f"/usr/sbin/{words[0]}"
        self.signal.process(
            Exec(tgid, at * MS, 0, (PROXY, 1), netns, netns, words[0][:15], path, arguments=words)
        )

    def end(self, tgid: int, at: int, status: int = 0) -> None:
        """A process ends."""
        self.signal.process(Exit(tgid, at * MS, status))

    def write(self, tgid: int, begin: int, end: int) -> Rewrite:
        """A transaction."""
        rewrite = Rewrite(
            DataPlane.NFTABLES,
            "ipv4",
            "kube-proxy",
            "kube-proxy",
            ProcessRun(tgid),
            begin * MS,
            end * MS,
            1,
            Outcome.COMMITTED,
        )
        self.signal.rewrite(rewrite)
        return rewrite

    def value(self, name: str) -> dict[tuple[str, ...], float]:
        """A family's values, or counts."""
        (found,) = (family for family in self.signal.families() if family.spec.name == name)
        return {
            sample.labels: sample.count if isinstance(sample, HistogramSample) else sample.value
            for sample in found.samples
        }


@pytest.fixture
def node(tmp_path: Path) -> Node:
    """A node."""
    return Node(tmp_path)


def test_records_of_two_rings_are_put_in_order(node: Node) -> None:
    """Processes are handed over before rewrites: by then the exit is known already."""
    node.begin(30, 0, "nft --json --terse list table ip kube-proxy")
    node.end(30, 100)
    node.begin(31, 110, "nft -f -")
    node.end(31, 130)
    rewrite = node.write(31, 115, 116)
    node.signal.settle(99_999 * MS)
    assert node.signal.began_ns(rewrite) == 0
    node.now_ns = 2000 * MS
    node.signal.tick()
    (sync,) = node.syncs
    assert (sync.writer, sync.owner, sync.duration_ns) == ("kube-proxy", PROXY, 130 * MS)
    assert sync.phases[Phase.TEARDOWN] == 14 * MS
    labels = ("nftables", "ipv4", "kube-proxy")
    assert node.value("kptrace_sync_duration_seconds") == {(*labels, "committed"): 1.0}
    assert node.value("kptrace_sync_last_success_timestamp_seconds").keys() == {labels}
    assert node.signal.status(names=True) == {
        "syncs": [
            {
                "dataplane": "nftables",
                "family": "ipv4",
                "writer": "kube-proxy",
                "outcome": "committed",
                "ms": 130.0,
                "phases": {"list": 100.0, "compute": 10.0, "write": 5.0, "commit": 1.0, "teardown": 14.0},
            }
        ]
    }


def test_what_is_newer_than_the_reading_waits(node: Node) -> None:
    """An exit was read of one ring, its process's transaction not yet of the other."""
    node.begin(31, 0, "nft -f -")
    node.end(31, 30)
    node.signal.settle(20 * MS)
    node.write(31, 10, 25)
    node.signal.settle(40 * MS)
    node.now_ns = 2000 * MS
    node.signal.tick()
    (sync,) = node.syncs
    assert (sync.family, len(sync.commits), sync.duration_ns) == ("ipv4", 1, 30 * MS)


def test_a_run_is_seen_before_its_end(node: Node) -> None:
    """As soon as it is settled, and it is 0 afterwards."""
    (node.proc / "31").mkdir()
    node.begin(31, 0, "nft -f -")
    node.signal.settle(99_999 * MS)
    node.now_ns = 5000 * MS
    node.signal.tick()
    assert node.value("kptrace_sync_running_seconds") == {("kube-proxy",): 5.0}
    node.write(31, 5100, 5101)
    node.end(31, 5110)
    node.signal.settle(99_999 * MS)
    node.now_ns = 9000 * MS
    node.signal.tick()
    assert node.value("kptrace_sync_running_seconds") == {("kube-proxy",): 0.0}


def test_other_namespaces_and_programs_are_not_taken_in(node: Node) -> None:
    """A pod's iptables are its own, and most programs write no rules."""
    node.begin(30, 0, "nft -f -", ELSEWHERE)
    node.begin(31, 0, "bash")
    node.end(30, 5, 1)
    node.signal.settle(99_999 * MS)
    node.now_ns = 9000 * MS
    node.signal.tick()
    assert node.syncs == []


def test_a_process_that_is_gone_does_not_hold_its_run(node: Node) -> None:
    """Its exit was lost: procfs knows, and so does the metric of losses."""
    node.begin(31, 0, "nft -f -")
    node.write(31, 10, 11)
    node.lost = 1
    node.signal.settle(99_999 * MS)
    for node.now_ns in (1000 * MS, 3000 * MS):
        node.signal.tick()
    (sync,) = node.syncs
    assert not sync.complete
    assert node.signal.losses()["sync", "exit_missed"] == 1
    assert node.signal.losses()["sync", "ring_full"] == 1


def test_spans_belong_to_their_process(node: Node) -> None:
    """Dumps of kube-proxy itself are its list."""
    node.signal.span(PROXY, Phase.LIST, 0, 50 * MS, "ipv4")
    node.begin(31, 60, "nft -f -")
    node.write(31, 65, 66)
    node.end(31, 70)
    node.signal.settle(99_999 * MS)
    node.now_ns = 2000 * MS
    node.signal.tick()
    (sync,) = node.syncs
    assert sync.phases[Phase.LIST] == 50 * MS


def test_an_unknown_writer_works_for_itself(node: Node) -> None:
    """Nothing is known of its process."""
    node.write(99, 10, 20)
    node.signal.settle(99_999 * MS)
    node.now_ns = 2000 * MS
    node.signal.tick()
    assert [sync.owner for sync in node.syncs] == [99]


def test_everything_it_can_yield_is_described(node: Node) -> None:
    """And its state is that of the records it lives on."""
    assert [family.spec for family in node.signal.families()] == list(node.signal.describe())
    assert [state.signal for state in node.signal.states()] == ["sync"]
    assert all(count == 0 for count in node.signal.losses().values())
    assert not any(isinstance(sample, Sample) for f in node.signal.families() for sample in f.samples)
