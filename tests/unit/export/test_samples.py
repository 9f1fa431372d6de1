# SPDX-License-Identifier: Apache-2.0
"""What a source may yield, and what is refused because Prometheus would refuse the scrape."""

import math
from dataclasses import replace

import pytest

from kptrace.export.registry import Exporter
from kptrace.export.samples import Gathered
from kptrace.model.metrics import Exemplar, HistogramSample, MetricFamily, MetricSpec, Sample
from tests.unit.export.fakes import COUNT, DURATION, FakeSource, counters, histogram


def test_a_bucket_points_to_its_exemplar_in_openmetrics_only() -> None:
    """The bucket that the observation fell into names the record; the other text format has no exemplars."""
    shown = Exemplar({"record": "17"}, 0.125, 1_700_000_000.0)
    sample = replace(histogram(("c", "first"), 0, 0, 1, 1), exemplars={0.25: shown})
    exporter = Exporter(lambda: [FakeSource("one", MetricFamily(DURATION, [sample]))])
    lines = exporter.render("application/openmetrics-text")[0].decode().splitlines()
    marked = [line for line in lines if "record=" in line]
    assert len(marked) == 1
    assert 'le="0.25"' in marked[0]
    assert marked[0].endswith('# {record="17"} 0.125 1700000000.0')
    assert b"record=" not in exporter.render("text/plain")[0]


def test_two_sources_may_share_a_metric() -> None:
    """Label sets of one metric from two sources become one family: it may be described once only."""
    gathered = Gathered()
    gathered.add([counters(input=1.0)])
    gathered.add([counters(output=2.0)])
    assert gathered.families() == [MetricFamily(COUNT, [Sample(("input",), 1.0), Sample(("output",), 2.0)])]


@pytest.mark.parametrize(
    "bad",
    [
        MetricFamily(COUNT, [Sample(("input",), 9.0)]),
        MetricFamily(COUNT, [Sample(("a",), 1.0), Sample(("a",), 1.0)]),
        MetricFamily(COUNT, [Sample(("a", "b"), 1.0)]),
        MetricFamily(COUNT, [histogram(("a",), 1, 2, 3, 4)]),
        MetricFamily(DURATION, [Sample(("a", "b"), 1.0)]),
        MetricFamily(DURATION, [histogram(("a", "b"), 1, 3, 2, 4)]),
        MetricFamily(DURATION, [HistogramSample(("a", "b"), ((1.0, 1),), 1.0)]),
        MetricFamily(DURATION, [HistogramSample(("a", "b"), ((2.0, 1), (1.0, 1), (math.inf, 1)), 1.0)]),
        MetricFamily(DURATION, [HistogramSample(("a", "b"), (), 1.0)]),
        MetricFamily(MetricSpec(COUNT.name, "gauge", "Else.", ("hook",)), [Sample(("a",), 1.0)]),
        MetricFamily(MetricSpec("kptrace_series", "gauge", "Mine."), [Sample((), 1.0)]),
    ],
)
def test_a_broken_family_is_refused_whole(bad: MetricFamily) -> None:
    """A source that breaks its specification, or repeats another's sample, leaves nothing behind."""
    gathered = Gathered([MetricSpec("kptrace_series", "gauge", "Series.")])
    gathered.add([counters(input=1.0)])
    before = gathered.families()
    with pytest.raises(ValueError, match="kptrace_"):
        gathered.add([MetricFamily(MetricSpec("kptrace_fine", "gauge", "Fine."), [Sample((), 1.0)]), bad])
    assert gathered.families() == before


def test_undecodable_names_are_written_anyway() -> None:
    """A name with bytes that are no UTF-8 gets question marks instead of failing the scrape."""
    gathered = Gathered()
    gathered.add([counters(**{b"ab\xff".decode("utf-8", "surrogateescape"): 1.0, "ü": 2.0})])
    assert [sample.labels for sample in gathered.families()[0].samples] == [("ab?",), ("ü",)]
