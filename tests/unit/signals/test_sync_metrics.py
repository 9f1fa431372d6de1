# SPDX-License-Identifier: Apache-2.0
"""What is counted of syncs."""

from collections.abc import Mapping

import pytest

from kptrace.model.metrics import HistogramSample, Sample
from kptrace.model.rewrite import Outcome
from kptrace.signals.sync_events import Phase, Sync
from kptrace.signals.sync_metrics import DURATION, LAST_SUCCESS, PHASE, RUNNING, SPECS, SyncCounts

SECOND = 1_000_000_000
BOOT = 1_000_000.0


def sync(outcome: Outcome = Outcome.COMMITTED, end: int = 10, family: str = "ipv4") -> Sync:
    """A run of two seconds."""
    phases = {Phase.LIST: SECOND, Phase.COMMIT: SECOND}
    return Sync("nftables", family, "kube-proxy", 1, (end - 2) * SECOND, end * SECOND, outcome, phases)


def counts() -> SyncCounts:
    """Of a node that was started at `BOOT`."""
    return SyncCounts(lambda ns: BOOT + ns / 1e9)


def values(counted: SyncCounts, now_ns: int = 0) -> Mapping[str, dict[tuple[str, ...], float]]:
    """Value, or sum, by labels and family."""
    return {
        family.spec.name: {
            sample.labels: sample.sum if isinstance(sample, HistogramSample) else sample.value
            for sample in family.samples
        }
        for family in counted.families(now_ns)
    }


def test_a_run_is_counted_by_outcome_and_its_phases_add_up_to_it() -> None:
    """Under the dictionary's labels."""
    made = counts()
    made.add(sync())
    found = values(made)
    assert found[DURATION.name] == {("nftables", "ipv4", "kube-proxy", "committed"): 2.0}
    assert found[PHASE.name] == {
        ("nftables", "ipv4", "kube-proxy", "list"): 1.0,
        ("nftables", "ipv4", "kube-proxy", "commit"): 1.0,
    }


@pytest.mark.parametrize("outcome", [Outcome.FAILED, Outcome.UNKNOWN, Outcome.EMPTY])
def test_only_committed_runs_have_phases(outcome: Outcome) -> None:
    """The sums of phases are comparable with the sum of committed durations."""
    made = counts()
    made.add(sync(outcome))
    found = values(made)
    assert found[PHASE.name] == {}
    assert found[DURATION.name] == {("nftables", "ipv4", "kube-proxy", outcome.value): 2.0}


def test_the_last_success_is_a_time_of_the_clock_on_the_wall() -> None:
    """With or without something to change; a failure does not move it, nor does one that is told of late."""
    made = counts()
    for each in (
        sync(end=10),
        sync(Outcome.EMPTY, 20),
        sync(Outcome.FAILED, 30),
        sync(Outcome.UNKNOWN, 35),
        sync(end=15),
    ):
        made.add(each)
    made.add(sync(end=40, family="ipv6"))
    assert values(made)[LAST_SUCCESS.name] == {
        ("nftables", "ipv4", "kube-proxy"): BOOT + 20,
        ("nftables", "ipv6", "kube-proxy"): BOOT + 40,
    }


def test_a_run_is_seen_while_it_lasts_and_is_zero_when_there_is_none() -> None:
    """At any time of the scrape, also one before the beginning was known."""
    made = counts()
    assert values(made)[RUNNING.name] == {}
    made.publish({"kube-proxy": 5 * SECOND})
    assert values(made, 900 * SECOND)[RUNNING.name] == {("kube-proxy",): 895.0}
    assert values(made, 4 * SECOND)[RUNNING.name] == {("kube-proxy",): 0.0}
    made.add(sync())
    made.publish({})
    assert values(made, 999 * SECOND)[RUNNING.name] == {("kube-proxy",): 0.0}


def test_every_family_is_there_and_described() -> None:
    """In the order of the specifications."""
    families = list(counts().families(0))
    assert tuple(family.spec for family in families) == SPECS
    assert not any(isinstance(sample, Sample) for family in families for sample in family.samples)
