# SPDX-License-Identifier: Apache-2.0

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kptrace.experiments.scrape import Distribution, Scrape, parse
from kptrace.model.errors import KptraceError

TEXT = """\
# HELP d_seconds a histogram
# TYPE d_seconds histogram
d_seconds_bucket{hook="output",walk="first",le="1e-06"} 1
d_seconds_bucket{hook="output",walk="first",le="2e-06"} 3.0
d_seconds_bucket{hook="output",walk="first",le="+Inf"} 4
d_seconds_count{hook="output",walk="first"} 4
d_seconds_bucket{hook="output",walk="rest",le="1e-06"} 0
d_seconds_bucket{hook="output",walk="rest",le="2e-06"} 10
d_seconds_bucket{hook="output",walk="rest",le="+Inf"} 10
lost_total{signal="a"} 2
lost_total{signal="b"} 3 1700000000
plain 7
# EOF
"""


def test_histograms_are_summed_over_the_labels_that_are_left_open() -> None:
    """A filter picks one histogram, no filter sums all of them."""
    scrape = Scrape(TEXT)
    assert scrape.distribution("d_seconds", walk="first").buckets == ((1e-06, 1), (2e-06, 3), (math.inf, 4))
    assert scrape.distribution("d_seconds").count == 14
    assert scrape.distribution("d_seconds", walk="none").count == 0


def test_counters_are_summed() -> None:
    """Counters of one name add up; a missing one is nothing."""
    scrape = Scrape(TEXT)
    assert scrape.total("lost_total") == 5
    assert scrape.total("lost_total", signal="b") == 3
    assert scrape.total("plain") == 7
    assert scrape.total("missing") == 0


def test_lines_are_shown_as_they_stand() -> None:
    """The excerpt holds the exposition's own lines, those with the labels asked for."""
    assert Scrape(TEXT).lines("d_seconds_count", walk="first") == [
        'd_seconds_count{hook="output",walk="first"} 4'
    ]


def test_what_is_no_exposition_is_refused() -> None:
    """HTML instead of metrics is an error that shows the line."""
    with pytest.raises(KptraceError, match="not a sample"):
        Scrape("<html>")


@given(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r"), max_size=20),
    st.floats(allow_nan=False),
)
def test_escaped_label_values_come_back(value: str, number: float) -> None:
    """Any label value survives the exposition's escaping."""
    escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    (sample,) = parse(f'm{{a="{escaped}",b="x,y}}"}} {number!r}\n')
    assert sample.labels == {"a": value, "b": "x,y}"}
    assert sample.value == number


def test_what_was_there_before_is_taken_off() -> None:
    """A difference counts only later observations, also where there was no histogram before."""
    before = Distribution(((1.0, 2), (math.inf, 3)))
    after = Distribution(((1.0, 5), (math.inf, 9)))
    assert after.since(before).buckets == ((1.0, 3), (math.inf, 6))
    assert after.since(Distribution()) == after


@given(st.lists(st.integers(1, 10_000), min_size=1), st.floats(0.01, 1.0))
def test_a_quantile_lies_in_the_bucket_of_the_true_one(values: list[int], q: float) -> None:
    """The interpolated quantile falls between the edges around the true quantile of the observations."""
    edges = [1, 10, 100, 1000, 10_000]
    found = Distribution(
        (
            *((float(edge), float(sum(value <= edge for value in values))) for edge in edges),
            (math.inf, float(len(values))),
        )
    )
    true = sorted(values)[max(0, math.ceil(q * len(values) - 1e-9) - 1)]
    upper = next(edge for edge in edges if true <= edge)
    lower = max([0, *(edge for edge in edges if edge < true)])
    assert lower <= found.quantile(q) <= upper


def test_a_quantile_beyond_the_last_edge_is_that_edge() -> None:
    """Nothing is invented above the last finite edge, and nothing where there is no observation."""
    assert Distribution(((1.0, 0), (2.0, 1), (math.inf, 10))).quantile(0.99) == 2.0
    assert math.isnan(Distribution().quantile(0.5))
