# SPDX-License-Identifier: Apache-2.0
"""One scrape: formats, isolation of sources, the number of series."""

import gzip
import itertools
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import prometheus_client
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from structlog.testing import capture_logs

from kptrace.export import selfmetrics
from kptrace.export.registry import SPECS, Exporter, accepts_gzip
from kptrace.export.selfmetrics import SelfMetrics
from kptrace.model.metrics import MetricFamily, Sample
from kptrace.model.signal import MechanismState, Source, State
from tests.unit.export.fakes import (
    BRACKET,
    COUNT,
    DURATION,
    SIZE,
    FakeSource,
    counters,
    fake_proc,
    histogram,
)

OPENMETRICS = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3,*/*;q=0.2"


def exporter(*sources: Source, **options: int) -> Exporter:
    """An exporter in whose clock every reading takes a quarter of a second."""
    ticks = itertools.count(0, 0.25)
    return Exporter(lambda: sources, clock=lambda: next(ticks), **options)


def values(which: Exporter) -> dict[tuple[str, tuple[str, ...]], float]:
    """A scrape by sample name and label values, read by prometheus_client's own parser."""
    families = parse_text(which.render("")[0].decode())
    return {(s.name, tuple(s.labels.values())): s.value for family in families for s in family.samples}


@pytest.fixture
def whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Exporter:
    """Every kind of metric, a failing source, hostile labels, and the daemon itself on a made-up machine."""
    monkeypatch.setattr(platform, "release", lambda: "6.12.1")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(platform, "python_version", lambda: "3.11.2")
    monkeypatch.setattr(selfmetrics, "__version__", "1.2.3")
    monkeypatch.setattr(os, "sysconf", {"SC_CLK_TCK": 100, "SC_PAGE_SIZE": 4096}.__getitem__)
    own = SelfMetrics(
        lambda: [
            MechanismState("lookup", "bracket", State.ACTIVE),
            MechanismState("lookup", "fentry", State.UNAVAILABLE, "no_btf", "a detail is no label"),
        ],
        lambda: {("rewrite", "ring_full"): 0, ("daemon", "callback_failed"): 3},
        fake_proc(tmp_path),
    )
    signals = FakeSource(
        "lookup",
        MetricFamily(
            DURATION,
            [histogram(("filter", "first"), 1, 3, 9, 10), histogram(("nat", "rest"), 0, 0, 0, 0, total=0)],
        ),
        counters(input=23.0, output=1e9),
        MetricFamily(BRACKET, [Sample(('a "quoted" \\ chain\nof two lines',), 1.0)]),
        MetricFamily(SIZE),
    )
    return exporter(signals, FakeSource("broken", RuntimeError("no map")), own)


def test_the_text_is_as_agreed(whole: Exporter, golden: Callable[[str, str], None]) -> None:
    """The Prometheus text, literally."""
    body, headers = whole.render("")
    golden("metrics.txt", body.decode())
    assert headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"


def test_openmetrics_is_as_agreed(whole: Exporter, golden: Callable[[str, str], None]) -> None:
    """OpenMetrics, literally, for a client that asks as Prometheus does; its own parser accepts it."""
    body, headers = whole.render(OPENMETRICS)
    golden("openmetrics.txt", body.decode())
    assert headers["Content-Type"].startswith("application/openmetrics-text; version=1.0.0")
    assert len(list(parse_openmetrics(body.decode()))) == len(list(parse_text(whole.render("")[0].decode())))
    assert b"_created" not in body


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool")
def test_promtool_finds_no_fault(whole: Exporter) -> None:
    """`promtool check metrics` accepts the text without a remark."""
    check = subprocess.run(
        ["promtool", "check", "metrics"], input=whole.render("")[0], capture_output=True, check=False
    )
    assert (check.returncode, check.stdout, check.stderr) == (0, b"", b"")


def test_a_failing_source_is_alone() -> None:
    """It is shown as failed, counted, and logged once with its reason; what it yielded before is dropped."""
    good, bad = (
        FakeSource("good", counters(input=1.0)),
        FakeSource("bad", counters(output=2.0), OSError("gone")),
    )
    which = exporter(bad, good)
    with capture_logs() as logs:
        seen = [values(which) for _ in range(3)][-1]
    assert seen["kptrace_collector_success", ("good",)] == 1
    assert seen["kptrace_collector_success", ("bad",)] == 0
    assert seen["kptrace_collector_failures_total", ("bad",)] == 3
    assert seen["kptrace_collector_failures_total", ("good",)] == 0
    assert seen["kptrace_collector_duration_seconds", ("bad",)] == 0.25
    assert seen["kptrace_packets_total", ("input",)] == 1
    assert ("kptrace_packets_total", ("output",)) not in seen
    assert [(each["event"], each["source"], each["error"]) for each in logs] == [
        ("source_failed", "bad", "gone")
    ]

    bad.given.pop()
    with capture_logs() as logs:
        assert values(which)["kptrace_packets_total", ("output",)] == 2
    assert [each["event"] for each in logs] == ["source_recovered"]


def test_a_source_cannot_spoil_anothers_metric() -> None:
    """A sample that is there already fails its own source only."""
    seen = values(exporter(FakeSource("one", counters(a=1.0)), FakeSource("two", counters(a=2.0, b=3.0))))
    assert seen["kptrace_packets_total", ("a",)] == 1
    assert ("kptrace_packets_total", ("b",)) not in seen
    assert seen["kptrace_collector_success", ("two",)] == 0


def test_series_stay_within_the_budget() -> None:
    """The scrape has no more series than allowed, says how many it has, and counts what it folded."""
    source = FakeSource("many", MetricFamily(COUNT, [Sample((f"{n:04}",), 1.0) for n in range(5000)]))
    which = exporter(source, max_series=100)
    hidden = 0.0
    for _ in range(2):
        seen = values(which)
        assert len(seen) <= 100
        assert seen["kptrace_series", ()] == len(seen)
        shown = sum(1 for name, _ in seen if name == COUNT.name)
        assert seen[COUNT.name, ("~other",)] == 5000 - shown + 1
        hidden += 5000 - shown + 1
        assert seen["kptrace_series_folded_total", (COUNT.name,)] == hidden
    assert len(seen) == 100


def test_many_series_are_warned_of_once() -> None:
    """Crossing the budget is one warning, not one for every scrape."""
    which = exporter(FakeSource("many", counters(a=1.0, b=1.0)), warn_series=4)
    with capture_logs() as logs:
        values(which)
        values(which)
    assert [each["event"] for each in logs] == ["many_series"]


def test_sources_are_read_by_scrapes_only() -> None:
    """Making an exporter and describing it reads no source, and leaves the global registry alone."""
    before = list(prometheus_client.REGISTRY.collect())
    source = FakeSource("one", counters(a=1.0))
    which = exporter(source)
    assert {metric.name for metric in which.describe()} >= {"kptrace_packets", "kptrace_series"}
    assert source.reads == 0
    values(which)
    assert source.reads == 1
    assert [m.name for m in prometheus_client.REGISTRY.collect()] == [m.name for m in before]


@pytest.mark.parametrize(
    ("accept_encoding", "zipped"),
    [
        ("gzip", True), ("deflate, GZIP;q=0.5", True), ("", False), ("identity", False), ("gzip;q=0", False),
        ("gzip; q=0.000", False), ("xgzip", False),
    ],
)  # fmt: skip
def test_gzip_only_where_accepted(accept_encoding: str, zipped: bool) -> None:
    """The body is compressed for clients that said so."""
    assert accepts_gzip(accept_encoding) is zipped
    which = exporter(FakeSource("one", counters(a=1.0)))
    body, headers = which.render("", accept_encoding)
    assert (headers.get("Content-Encoding") == "gzip") is zipped
    assert b"kptrace_packets_total" in (gzip.decompress(body) if zipped else body)


@pytest.mark.parametrize(
    "accept", ["application/openmetrics-text;version=x", "text/plain;version=", ";;;,,", "*/*", "\xff"]
)
def test_odd_accept_headers_get_text(accept: str) -> None:
    """A header that makes no sense is answered in plain text instead of failing the scrape."""
    body, headers = exporter(FakeSource("one", counters(a=1.0))).render(accept)
    assert headers["Content-Type"].startswith("text/plain")
    assert body


def test_own_metrics_have_one_meaning() -> None:
    """The exporter's own specifications are all distinct."""
    names: Sequence[str] = [spec.name for spec in SPECS]
    assert len(set(names)) == len(names)
