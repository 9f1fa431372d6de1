# SPDX-License-Identifier: Apache-2.0
"""The bound on the number of series keeps every total, and lets no counter fall."""

import math
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from kptrace.export.folding import Folder, cost, fair_share, merge
from kptrace.model.metrics import OTHER, HistogramSample, MetricFamily, MetricSpec, Sample
from tests.unit.export.fakes import BRACKET, COUNT, DURATION, SIZE, histogram

LABELS = st.lists(st.text("abcdef", min_size=1, max_size=3), unique=True, max_size=30)


@st.composite
def count_families(draw: st.DrawFn) -> MetricFamily:
    """A counter with any number of label sets."""
    return MetricFamily(COUNT, [Sample((name,), float(draw(st.integers(0, 1000)))) for name in draw(LABELS)])


@st.composite
def duration_families(draw: st.DrawFn) -> MetricFamily:
    """A histogram with any number of label sets, on one ladder."""
    samples = []
    for name in draw(LABELS):
        steps = draw(st.lists(st.integers(0, 100), min_size=4, max_size=4))
        cumulative = [sum(steps[: i + 1]) for i in range(4)]
        samples.append(histogram((name, "first"), *cumulative, total=float(draw(st.integers(0, 50)))))
    return MetricFamily(DURATION, samples)


def total(family: MetricFamily) -> tuple[float, ...]:
    """What folding must keep: the sum of the values, or of every bucket and of the sums."""
    columns: list[tuple[float, ...]] = []
    for each in family.samples:
        if isinstance(each, HistogramSample):
            columns.append((*(count for _, count in each.buckets), each.sum))
        else:
            columns.append((each.value,))
    return tuple(map(sum, zip(*columns, strict=True)))


def names(family: MetricFamily) -> list[tuple[str, ...]]:
    """The label sets, sorted."""
    return sorted(sample.labels for sample in family.samples)


@given(count_families(), duration_families(), st.integers(12, 200))
def test_totals_are_kept_and_the_limit_holds(
    counts: MetricFamily, durations: MetricFamily, limit: int
) -> None:
    """Whatever is folded, the sums, every bucket and every count stay, no label set is twice, the limit holds."""
    before = [counts, durations]
    after, folded = Folder().fold(before, limit)
    assert [total(each) for each in after] == [total(each) for each in before]
    assert sum(cost(each.samples) for each in after) <= limit
    for each in after:
        assert len(set(names(each))) == len(each.samples)
    lost = sum(cost(each.samples) for each in before) - sum(cost(each.samples) for each in after)
    assert bool(folded) == (lost > 0 or any((OTHER,) * len(e.spec.labels) in names(e) for e in after))


@given(st.lists(count_families(), min_size=2, max_size=6), st.integers(2, 40))
def test_no_counter_falls_while_others_come_and_go(scrapes: Sequence[MetricFamily], limit: int) -> None:
    """A label set that was folded once stays folded: it never leaves `~other`, which would fall."""
    folder = Folder()
    folded: set[tuple[str, ...]] = set()
    for family in scrapes:
        (after,), counted = folder.fold([family], limit)
        shown = set(names(after)) - {(OTHER,)}
        assert not shown & folded
        folded |= set(names(family)) - shown if counted else set()


def test_who_came_first_stays() -> None:
    """Label sets that were shown before the metric grew too large keep their series."""
    folder = Folder()
    early = [Sample(("z",), 1.0), Sample(("y",), 2.0)]
    assert folder.fold([MetricFamily(COUNT, early)], 4)[1] == {}
    late = [Sample((name,), 10.0) for name in "abcde"]
    (after,), folded = folder.fold([MetricFamily(COUNT, [*late, *early])], 4)
    assert names(after) == [("a",), ("y",), ("z",), (OTHER,)]
    assert folded == {COUNT.name: 4}


def test_small_metrics_are_left_alone() -> None:
    """Only what is larger than its fair share is folded."""
    small = MetricFamily(SIZE, [Sample(("t", "rule"), 3.0), Sample(("t", "chain"), 4.0)])
    large = MetricFamily(COUNT, [Sample((f"{n:03}",), 1.0) for n in range(100)])
    (first, second), folded = Folder().fold([small, large], 20)
    assert first == small
    assert second.samples[-1] == Sample((OTHER,), 83.0)
    assert len(second.samples) == 18
    assert folded == {COUNT.name: 83}


def test_the_sources_own_other_is_folded_too() -> None:
    """A source's own `~other` sample and the excess become one sample, not two of one label set."""
    samples = [Sample((OTHER,), 5.0), *(Sample((name,), 1.0) for name in "abcd")]
    (after,), _ = Folder().fold([MetricFamily(COUNT, samples)], 3)
    assert names(after) == [("a",), ("b",), (OTHER,)]
    assert sum(s.value for s in after.samples if isinstance(s, Sample)) == 9.0


def test_the_order_of_samples_does_not_matter() -> None:
    """The same label sets are folded whichever order a source yields them in."""
    samples = [Sample((name,), 1.0) for name in "abcdef"]
    (forward,), _ = Folder().fold([MetricFamily(COUNT, samples)], 3)
    (backward,), _ = Folder().fold([MetricFamily(COUNT, samples[::-1])], 3)
    assert names(forward) == names(backward)


def test_times_shares_and_infos_show_the_largest() -> None:
    """What cannot be added is not added."""
    stamp = MetricSpec("kptrace_last_timestamp_seconds", "gauge", "When.", ("writer",))
    assert merge(stamp, [Sample(("a",), 17.0), Sample(("b",), 18.0)]) == Sample((OTHER,), 18.0)
    assert merge(BRACKET, [Sample(("a",), 1.0), Sample(("b",), 1.0)]) == Sample((OTHER,), 1.0)
    assert merge(SIZE, [Sample(("a", "x"), 2.0), Sample(("b", "x"), 3.0)]) == Sample((OTHER, OTHER), 5.0)


def test_unlike_ladders_keep_their_common_edges() -> None:
    """Histograms of unlike ladders are added where both have an edge, so that counts stay true."""
    one = HistogramSample(("a", "x"), ((1.0, 1), (2.0, 3), (math.inf, 4)), 5.0)
    two = HistogramSample(("b", "x"), ((2.0, 10), (3.0, 20), (math.inf, 30)), 50.0)
    assert merge(DURATION, [one, two]) == HistogramSample((OTHER, OTHER), ((2.0, 13), (math.inf, 34)), 55.0)


@given(st.lists(st.integers(0, 100), max_size=12), st.integers(0, 400))
def test_shares_fill_the_limit_and_no_more(costs: list[int], limit: int) -> None:
    """Everyone below the share has all it needs, and all together stay within the limit."""
    share = fair_share(costs, limit)
    assert sum(min(each, share) for each in costs) <= limit
    if sum(costs) <= limit:
        assert all(each <= share for each in costs)
    elif costs:
        assert sum(min(each, share + 1) for each in costs) > limit
