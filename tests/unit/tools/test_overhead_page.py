# SPDX-License-Identifier: Apache-2.0
"""docs/overhead.md: each part of the benchmark writes its own section and leaves the others as they are."""

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The page's writer; the benchmark's files find each other beside them."""
    monkeypatch.syspath_prepend(str(ROOT / "tools/bench"))
    return importlib.import_module("page")


@pytest.fixture
def instructions(page: ModuleType) -> ModuleType:
    """The part that a test machine measures."""
    return importlib.import_module("instructions")


def test_a_section_is_written_without_touching_the_others(page: ModuleType) -> None:
    """Sections stand in their order, whichever is measured first, and what follows them stays."""
    only = page.replaced("", "instructions", "one")
    both = page.replaced(only, "native", "two")
    assert both.index("two") < both.index("one")
    assert page.replaced(both, "native", "two") == both
    longer = both + "\n## By hand\n\ntext\n"
    again = page.replaced(longer, "instructions", "three")
    assert again.endswith("\n## By hand\n\ntext\n")
    assert "two" in again
    assert "one" not in again


def test_the_page_that_is_there_keeps_its_figures(page: ModuleType) -> None:
    """Of docs/overhead.md as it stands nothing is lost when a section is written anew."""
    present = (ROOT / "docs/overhead.md").read_text(encoding="utf-8")
    changed = page.replaced(present, "instructions", "new")
    lost = [line for line in present.splitlines() if line not in changed]
    begin, end = "<!-- instructions: begin -->", "<!-- instructions: end -->"
    old = present.partition(begin)[2].partition(end)[0]
    assert not [line for line in lost if line not in old]


def row(plane: str, way: str, value: float, **more: float) -> str:
    """A line as the test machine prints it."""
    return "instructions: " + json.dumps(
        {"plane": plane, "way": way, "sent": 20_000, "instructions": value, **more}
    )


def test_figures_are_above_nothing_and_by_walk(instructions: ModuleType) -> None:
    """A packet that walks two hooks has the budget twice; what was timed and lost is shown."""
    lines = [
        row("iptables-legacy", "nothing", 9000.0),
        row("iptables-legacy", "bracket, every packet", 10_000.0, timed=40_000, lost=0),
        row("iptables-legacy", "bracket, 1/64", 9100.0, timed=625, lost=0),
        row("iptables-legacy", "bpftrace, kprobe pair", 11_600.0),
    ]
    rows = [instructions.read(line) for line in lines]
    (figure,) = instructions.figures(rows)
    assert (figure.value, figure.budget) == (500.0, 600.0)
    text = instructions.section(rows, "6.12.1")
    assert "| bracket, every packet | + 1,000 | 2 | + 500 | <= 600 | 20,000 | 40,000 | 0 |" in text
    assert "| bracket, 1/64 | + 100 | 2 | + 50 |  | 20,000 | 625 | 0 |" in text
    assert "| bpftrace, kprobe pair | + 2,600 | 2 | + 1,300 |  | 20,000 |  |  |" in text


def test_means_may_differ_by_what_the_tracers_cost(instructions: ModuleType) -> None:
    """Of the same packets by bracket and by fentry: half the tracers' cost is the budget, of which --check allows twice."""
    lines = [
        row("nftables", "nothing", 9000.0),
        row("nftables", "bracket, every packet", 9600.0, timed=20_000, lost=0, mean=4_000.0),
        row("nftables", "fentry, every packet", 10_000.0, timed=20_000, lost=0, mean=4_900.0),
    ]
    *_, apart = instructions.figures([instructions.read(line) for line in lines])
    assert (apart.value, apart.budget) == (900.0, 800.0)


def test_a_way_that_does_not_work_is_no_figure(instructions: ModuleType) -> None:
    """What failed in the test machine fails the benchmark, with its reason."""
    with pytest.raises(RuntimeError, match=r"nftables, fentry: bpf: EPERM"):
        instructions.read('instructions: {"plane": "nftables", "way": "fentry", "error": "bpf: EPERM"}')
