# SPDX-License-Identifier: Apache-2.0
"""What the programming signal counts."""

import math

from kptrace.model.metrics import HistogramSample, MetricFamily
from kptrace.signals.programming_events import Attribution, Change, Commit, Fate, Reason, Result
from kptrace.signals.programming_metrics import PROGRAMMING_LADDER, SPECS, ProgrammingCounts
from kptrace.signals.programming_pending import Ages
from kptrace.signals.writers import KUBE_PROXY
from tests.unit.signals.programming_story import ADDED, MS, REMOVED, V4, V6, change, commit, names

WALL_NS = 1_700_000_000 * 10**9


def programmed(what: Change, by: Commit, fate: Fate = Fate.PROGRAMMED) -> Result:
    """A change that a commit carried."""
    return Result(what, fate, by, Attribution.EXACT)


def counts() -> ProgrammingCounts:
    """Counts on a machine that started at a round second."""
    return ProgrammingCounts(KUBE_PROXY, lambda ns: WALL_NS + ns)


def values(made: ProgrammingCounts, now: int = 0) -> dict[str, dict[tuple[str, ...], float]]:
    """Everything exposed; of histograms the number and of each the labels."""
    families: list[MetricFamily] = list(made.families(now))
    return {
        family.spec.name.removeprefix("kptrace_programming_"): {
            each.labels: each.count if isinstance(each, HistogramSample) else each.value
            for each in family.samples
        }
        for family in families
    }


def test_every_family_is_there_from_the_start() -> None:
    """Losses count from 0; other label sets come with their first sample."""
    made = counts()
    assert {family.spec for family in made.families(0)} == set(SPECS)
    assert values(made)["trigger_rejected_total"] == {(KUBE_PROXY, "negative"): 0, (KUBE_PROXY, "absurd"): 0}
    assert all(found == {} for name, found in values(made).items() if name != "trigger_rejected_total")


def test_each_fate_has_its_counter() -> None:
    """A sample, an early one, one undone, and one without a figure."""
    made = counts()
    for ip in ("10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4"):
        made.add_change(change(100, ip=ip))
    made.add(programmed(change(100), commit(101, 140, names())))
    made.add(programmed(change(100), commit(50, 60), Fate.EARLY))
    made.add(Result(change(100), Fate.SUPERSEDED))
    made.add(Result(change(100, REMOVED), Fate.UNMEASURED, reason=Reason.OVERFLOW))
    found = values(made)
    assert found["changes_total"] == {(KUBE_PROXY, "ipv4", "endpoint_added"): 4}
    assert found["duration_seconds"] == {("nftables", "ipv4", "endpoint_added", "exact"): 1}
    assert found["early_total"] == {("iptables-legacy", "ipv4", "endpoint_added"): 1}
    assert found["superseded_total"] == {(KUBE_PROXY, "ipv4", "endpoint_added"): 1}
    assert found["unmeasured_total"] == {(KUBE_PROXY, "ipv4", "endpoint_removed", "overflow"): 1}
    assert found["since_trigger_seconds"] == {}


def test_durations_are_seconds_on_a_ladder_that_is_dense_around_one() -> None:
    """The second of rest is kube-proxy's."""
    made = counts()
    for end in (140, 1240, 1600, 35_100):
        made.add(programmed(change(100), commit(101, end, names())))
    (sample,) = next(family for family in made.families(0) if family.spec is SPECS[0]).samples
    assert isinstance(sample, HistogramSample)
    assert math.isclose(sample.sum, 0.04 + 1.14 + 1.5 + 35)
    assert dict(sample.buckets)[1.0] == 1
    assert dict(sample.buckets)[1.5] == 3
    assert dict(sample.buckets)[60.0] == 4
    assert len(sample.buckets) == len(PROGRAMMING_LADDER) + 1 == 16


def test_the_trigger_has_a_metric_of_its_own_and_odd_times_are_counted() -> None:
    """Early commits too; negative and absurd ones are not clamped."""
    made = counts()
    by = commit(101, 140, names())
    end_ns = WALL_NS + by.end_ns
    for since in (0, 3600 * 10**9, -1, 3600 * 10**9 + 1):
        made.add(programmed(change(100, ADDED, trigger_ns=end_ns - since), by))
    made.add(programmed(change(150, trigger_ns=end_ns - 1), by, Fate.EARLY))
    made.add(Result(change(100, trigger_ns=end_ns - 1), Fate.SUPERSEDED))
    found = values(made)
    assert found["since_trigger_seconds"] == {("nftables", "ipv4", "endpoint_added", "exact"): 3}
    assert found["trigger_rejected_total"] == {(KUBE_PROXY, "negative"): 1, (KUBE_PROXY, "absurd"): 1}


def test_what_is_pending_ages() -> None:
    """0 where nothing is."""
    made = counts()
    made.publish({V4: Ages(3, 100 * MS), V6: Ages()})
    found = values(made, 35_100 * MS)
    assert found["pending"] == {(KUBE_PROXY, "ipv4"): 3, (KUBE_PROXY, "ipv6"): 0}
    assert found["oldest_pending_seconds"] == {(KUBE_PROXY, "ipv4"): 35, (KUBE_PROXY, "ipv6"): 0}
