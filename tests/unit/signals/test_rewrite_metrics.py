# SPDX-License-Identifier: Apache-2.0
"""What is counted of rewrites, and that no flood of names makes it grow."""

import math
from collections import Counter
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kptrace.dataplanes.nftables.batch import decode_batch
from kptrace.model.metrics import OTHER, HistogramSample, MetricFamily, Sample
from kptrace.model.netfilter import DataPlane, Hook, IpFamily
from kptrace.model.rewrite import ObjectCount, Outcome, ProcessRun, Rewrite
from kptrace.signals.rewrite_labels import (
    FAMILIES,
    MAX_FOREIGN,
    NAME_BYTES,
    NFPROTOS,
    NONE,
    SEVERAL,
    TableNames,
    dataplane,
    family_and_table,
)
from kptrace.signals.rewrite_metrics import DURATION, ELSEWHERE, OBJECTS, SPECS, TRUNCATED, RewriteCounts
from kptrace.signals.writers import Writers
from tests.unit.dataplanes.wire import batch, name, nft

#: Tables that are always told apart: kube-proxy's, iptables' five, `~none`, `~several`; and the excess.
ALWAYS = 8 + 1


def rewrite(
    table: str = "kube-proxy",
    *,
    outcome: Outcome = Outcome.COMMITTED,
    duration_ns: int = 1000,
    writer: str = "kube-proxy",
    objects: Iterable[ObjectCount] = (),
    truncated: bool = False,
    plane: DataPlane = DataPlane.NFTABLES,
    family: str = "ipv4",
) -> Rewrite:
    """A rewrite of the watched namespace."""
    return Rewrite(
        dataplane=plane,
        family=family,
        table=table,
        writer=writer,
        run=ProcessRun(1),
        begin_ns=5,
        end_ns=5 + duration_ns,
        size=100,
        outcome=outcome,
        truncated=truncated,
        objects=tuple(objects),
    )


def counted(*rewrites: Rewrite) -> RewriteCounts:
    """The counts after these."""
    counts = RewriteCounts(TableNames())
    for each in rewrites:
        counts.add(each)
    return counts


def family(counts: RewriteCounts, name: str) -> MetricFamily:
    """One of its families."""
    (found,) = [each for each in counts.families() if each.spec.name == name]
    return found


def histograms(counts: RewriteCounts) -> dict[tuple[str, ...], HistogramSample]:
    """The durations by their labels."""
    samples = family(counts, DURATION.name).samples
    return {sample.labels: sample for sample in samples if isinstance(sample, HistogramSample)}


def values(counts: RewriteCounts, name: str) -> dict[tuple[str, ...], float]:
    """A counter's values by their labels."""
    samples = family(counts, name).samples
    return {sample.labels: sample.value for sample in samples if isinstance(sample, Sample)}


def series(counts: RewriteCounts) -> int:
    """Label sets, over all families."""
    return sum(len(each.samples) for each in counts.families())


def test_nothing_is_shown_before_the_first_rewrite() -> None:
    """Only the counter without labels is there from the start, at 0."""
    counts = counted()
    assert series(counts) == 1
    assert values(counts, ELSEWHERE.name) == {(): 0.0}


def test_a_rewrite_is_counted_under_its_labels() -> None:
    """One observation of its duration, in seconds, with every label in its place."""
    (sample,) = histograms(counted(rewrite(duration_ns=2_000_000))).items()
    assert sample[0] == ("nftables", "ipv4", "kube-proxy", "kube-proxy", "committed")
    assert len(sample[0]) == len(DURATION.labels)
    assert (sample[1].count, sample[1].sum) == (1, 0.002)


@given(st.lists(st.integers(0, 4 * 10**12), max_size=50))
def test_durations_lie_in_their_buckets(durations: list[int]) -> None:
    """`le` is true to the nanosecond, the last bucket has all, and the sum is exact."""
    counts = counted(*(rewrite(duration_ns=each) for each in durations))
    for sample in histograms(counts).values():
        assert sample.buckets[-1] == (math.inf, len(durations))
        assert len(sample.buckets) <= 16
        for edge, count in sample.buckets[:-1]:
            assert count == sum(1 for each in durations if each <= round(edge * 1e9))
        assert sample.sum == sum(durations) / 1e9
    assert bool(histograms(counts)) == bool(durations)


@pytest.mark.parametrize("outcome", list(Outcome))
def test_only_what_was_committed_changed_objects(outcome: Outcome) -> None:
    """A failed batch's duration counts, its objects and its length do not."""
    counts = counted(
        rewrite(
            outcome=outcome, truncated=True, objects=[ObjectCount("ipv4", "kube-proxy", "rule", "add", 3)]
        )
    )
    committed = outcome is Outcome.COMMITTED
    assert values(counts, OBJECTS.name) == (
        {("nftables", "kube-proxy", "rule", "add"): 3.0} if committed else {}
    )
    assert values(counts, TRUNCATED.name) == ({("nftables",): 1.0} if committed else {})
    assert [sample.count for sample in histograms(counts).values()] == [1]


def test_objects_are_added_up_by_table_over_families() -> None:
    """A batch for both families counts once for each, under one table."""
    objects = [ObjectCount(each, "kube-proxy", "rule", "add", 2) for each in ("ipv4", "ipv6")]
    counts = counted(rewrite(objects=objects), rewrite(objects=objects))
    assert values(counts, OBJECTS.name) == {("nftables", "kube-proxy", "rule", "add"): 8.0}


def test_other_namespaces_are_one_counter() -> None:
    """Pods' rewrites make no other series."""
    counts = counted()
    for _ in range(10_000):
        counts.add_elsewhere()
    assert values(counts, ELSEWHERE.name) == {(): 10_000.0}
    assert series(counts) == 1


def test_a_flood_of_tables_stays_within_its_bound() -> None:
    """Ten thousand tables with objects in as many more make no more series than the tables that are told apart."""
    counts = RewriteCounts(TableNames())
    for n in range(10_000):
        objects = [ObjectCount("inet", f"o{n}", "rule", "add", 1)]
        counts.add(rewrite(f"t{n}", objects=objects, truncated=True))
        assert n % 1000 or series(counts) <= 2 * (MAX_FOREIGN + ALWAYS) + 2
    assert sum(sample.count for sample in histograms(counts).values()) == 10_000
    assert sum(values(counts, OBJECTS.name).values()) == 10_000
    told = {labels[2] for labels in histograms(counts)} | {
        labels[1] for labels in values(counts, OBJECTS.name)
    }
    assert len(told) == MAX_FOREIGN + 1 == 33
    assert OTHER in told
    assert len(counts._names._told) == MAX_FOREIGN


def test_a_flood_of_writers_stays_within_the_table() -> None:
    """Ten thousand programs are of no more classes than the table has, each of which has one series."""
    writers, counts = Writers(), RewriteCounts(TableNames())
    for n in range(10_000):
        run = ProcessRun(n + 1, executable=f"/tmp/program{n}", comm=f"kube-proxy{n}")
        counts.add(rewrite(writer=writers.classify([run], watched_netns=True)))
    assert [labels[3] for labels in histograms(counts)] == ["other"]
    assert histograms(counts).popitem()[1].count == 10_000


def test_a_known_table_is_told_apart_in_any_flood() -> None:
    """kube-proxy's table and iptables' own never become `~other`, and a name that was told stays told."""
    names = TableNames()
    first = names.label("mine")
    for n in range(10_000):
        names.label(f"t{n}")
    for each in ("kube-proxy", "filter", "nat", "mangle", "raw", "security", NONE, SEVERAL):
        assert names.label(each) == each
    assert names.label("mine") == first == "mine"
    assert names.label("late") == OTHER
    assert names.label("") == NONE


@given(st.lists(st.text(), max_size=100))
def test_labels_are_bounded_in_number_and_length(tables: list[str]) -> None:
    """Whatever tables are called, few labels come of it, each short and the same for the same name."""
    names = TableNames()
    labels = [names.label(each) for each in tables]
    assert len(set(labels)) <= MAX_FOREIGN + ALWAYS
    assert all(0 < len(each.encode()) <= NAME_BYTES for each in labels)
    assert [names.label(each) for each in tables if names.label(each) != OTHER] == [
        each for each in labels if each != OTHER
    ]


def test_a_long_name_is_cut_between_characters() -> None:
    """A cut in the middle of a character leaves that character out; names alike up to there are one."""
    names = TableNames()
    assert names.label("x" + "ä" * 40) == "x" + "ä" * 31
    assert names.label("y" * 64 + "1") == names.label("y" * 64 + "2") == "y" * 64


rewrites = st.builds(
    rewrite,
    st.text(max_size=5),
    outcome=st.sampled_from(Outcome),
    duration_ns=st.integers(0, 10**13),
    writer=st.sampled_from(["kube-proxy", "other"]),
    truncated=st.booleans(),
    plane=st.sampled_from(DataPlane),
    objects=st.lists(
        st.builds(
            ObjectCount,
            st.sampled_from(["ipv4", "inet"]),
            st.text(max_size=3),
            st.sampled_from(["rule", "chain"]),
            st.sampled_from(["add", "flush"]),
            st.integers(1, 1000),
        ),
        max_size=4,
    ),
)


@settings(deadline=None)  # a busy machine is no failure
@given(st.lists(rewrites, max_size=15))
def test_nothing_is_lost_or_falls(many: list[Rewrite]) -> None:
    """Sums over all labels are the rewrites' own, no label set is twice, and no counter ever falls."""
    counts, before = RewriteCounts(TableNames()), Counter[tuple[str, ...]]()
    for each in many:
        counts.add(each)
        now = Counter({labels: int(value) for labels, value in values(counts, OBJECTS.name).items()})
        assert before <= now
        before = now
    committed = [each for each in many if each.outcome is Outcome.COMMITTED]
    assert sum(sample.count for sample in histograms(counts).values()) == len(many)
    assert before.total() == sum(thing.count for each in committed for thing in each.objects)
    assert sum(values(counts, TRUNCATED.name).values()) == sum(each.truncated for each in committed)
    for found in counts.families():
        assert len({sample.labels for sample in found.samples}) == len(found.samples)
        assert all(len(sample.labels) == len(found.spec.labels) for sample in found.samples)


def test_specifications_are_fit_for_prometheus() -> None:
    """Counters end in `_total`, durations in seconds, names are not twice, and each has a help."""
    assert len({spec.name for spec in SPECS}) == len(SPECS)
    for spec in SPECS:
        assert spec.name.startswith("kptrace_")
        assert (spec.kind == "counter") == spec.name.endswith("_total")
        assert spec.kind != "histogram" or spec.name.endswith("_seconds")
        assert spec.help.endswith(".")


def test_families_are_called_alike_everywhere() -> None:
    """A batch and a dump call each nfproto the same, there and back."""
    assert len(FAMILIES) == len(NFPROTOS) == 6
    for number, label in FAMILIES.items():
        assert decode_batch(batch(nft(0, name(1, "t"), family=number))).tables == {(label, "t")}
        assert NFPROTOS[label] == number
    assert {IpFamily(label).nfproto for label in ("ipv4", "ipv6")} == {NFPROTOS["ipv4"], NFPROTOS["ipv6"]}


@pytest.mark.parametrize(
    ("tables", "place"),
    [
        ([], (NONE, NONE)),
        ([("ipv4", "nat")], ("ipv4", "nat")),
        ([("ipv4", "")], ("ipv4", NONE)),
        ([("ipv4", "nat"), ("ipv6", "nat")], (SEVERAL, "nat")),
        ([("ipv4", "nat"), ("ipv4", "filter")], ("ipv4", SEVERAL)),
        ([("ipv4", "nat"), ("ipv6", "filter")], (SEVERAL, SEVERAL)),
    ],
)
def test_a_batch_has_one_family_and_one_table(tables: list[tuple[str, str]], place: tuple[str, str]) -> None:
    """What it touches if that is one, otherwise `~several`."""
    assert family_and_table(tables) == place


@pytest.mark.parametrize(
    ("nfproto", "table", "base", "plane"),
    [
        (2, "nat", (), DataPlane.IPTABLES_NFT),
        (10, "filter", ("INPUT", "mine"), DataPlane.IPTABLES_NFT),
        (2, "filter", ("input",), DataPlane.NFTABLES),
        (1, "filter", (), DataPlane.NFTABLES),
        (2, "kube-proxy", (), DataPlane.NFTABLES),
        (2, "mine", tuple(hook.name for hook in Hook), DataPlane.NFTABLES),
    ],
)
def test_a_table_is_iptables_by_its_name_and_base_chains(
    nfproto: int, table: str, base: tuple[str, ...], plane: DataPlane
) -> None:
    """One of iptables' five tables, in its families, with one of its base chains or none yet."""
    assert dataplane(nfproto, table, base) is plane
