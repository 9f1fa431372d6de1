# SPDX-License-Identifier: Apache-2.0
"""All metrics of kptrace: their names, their labels, and the page about them."""

import importlib
import pkgutil
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import kptrace
from kptrace.export.catalogue import catalogue
from kptrace.model.metrics import MetricSpec
from tests.unit.export.fakes import BRACKET, COUNT, DURATION, SIZE

#: Labels that scraping adds: of the target, of Kubernetes service discovery, and of its usual relabelling.
TAKEN = {"namespace", "pod", "service", "container", "endpoint", "instance", "job", "node", "le", "quantile"}
STANDARD = {
    "process_cpu_seconds_total",
    "process_resident_memory_bytes",
    "process_open_fds",
    "process_start_time_seconds",
}


def all_specs() -> Iterator[tuple[str, MetricSpec]]:
    """Every specification that a module of kptrace has as a constant, with the module."""
    for package in ("export", "signals", "identity", "daemon"):
        root = importlib.import_module(f"kptrace.{package}")
        for module in pkgutil.walk_packages(root.__path__, f"kptrace.{package}."):
            for value in vars(importlib.import_module(module.name)).values():
                for each in value if isinstance(value, tuple) else (value,):
                    if isinstance(each, MetricSpec):
                        yield module.name, each


def test_no_label_is_one_that_scraping_adds() -> None:
    """No label collides with those that scraping gives a target: Prometheus would rename ours."""
    clashes = {(spec.name, label) for _, spec in all_specs() for label in spec.labels if label in TAKEN}
    assert clashes == set()


def test_names_say_what_they_are() -> None:
    """Prefix, base unit, `_total` on counters and only there, `_info` on infos and only there."""
    wrong = []
    for _, spec in all_specs():
        fine = re.fullmatch(r"kptrace_[a-z0-9_]+[a-z0-9]", spec.name) or spec.name in STANDARD
        fine = fine and (spec.kind == "counter") == spec.name.endswith("_total")
        fine = fine and (spec.kind == "info") == spec.name.endswith("_info")
        fine = fine and not re.search(r"_(ns|us|ms|nanoseconds|microseconds|milliseconds|kb)(_|$)", spec.name)
        fine = fine and all(re.fullmatch(r"[a-z][a-z0-9_]*", label) for label in spec.labels)
        fine = fine and len(set(spec.labels)) == len(spec.labels) and spec.help.endswith(".")
        if not fine:
            wrong.append(spec)
    assert wrong == []


def test_one_name_has_one_meaning() -> None:
    """The same metric from two modules is the same specification."""
    by_name: dict[str, set[MetricSpec]] = defaultdict(set)
    for _, spec in all_specs():
        by_name[spec.name].add(spec)
    assert {name for name, specs in by_name.items() if len(specs) > 1} == set()
    assert len(by_name) > 10, f"only {sorted(by_name)} found in {kptrace.__path__}"


def test_the_page_is_as_agreed(golden: Callable[[str, str], None]) -> None:
    """One row a metric, by name, once."""
    hostile = MetricSpec("kptrace_a", "gauge", "A | pipe,\na line and a \\ backslash.")
    golden("catalogue.md", catalogue([DURATION, SIZE, COUNT, BRACKET, hostile, SIZE]))


def test_docs_have_every_metric(request: pytest.FixtureRequest) -> None:
    """docs/metrics.md is what the code says; `make golden` writes it anew."""
    path = Path(kptrace.__path__[0]).parent / "docs/metrics.md"
    text = catalogue(spec for _, spec in all_specs())
    if request.config.getoption("--update-golden"):
        path.write_text(text, encoding="utf-8")
    assert path.read_text(encoding="utf-8") == text, "make golden, then review the diff"


def test_two_meanings_of_a_name_are_refused() -> None:
    """A name that is specified twice, and differently, is an error."""
    with pytest.raises(ValueError, match="kptrace_objects"):
        catalogue([SIZE, MetricSpec(SIZE.name, "gauge", "Something else.")])
