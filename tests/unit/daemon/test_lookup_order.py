# SPDX-License-Identifier: Apache-2.0
"""The order in which `auto` tries the mechanisms of look-ups is that of the figures in docs/overhead.md."""

import itertools
import re
from pathlib import Path

from kptrace.daemon.lookup_parts import PARTS

ROOT = Path(__file__).parents[3]
_ROW = re.compile(r"^\| (bracket|fentry|kprobe), (every packet|1/64) \| \+ ([\d,]+) \|", re.MULTILINE)


def costs() -> dict[str, list[float]]:
    """Guest instructions of a packet by mechanism, each way on each data plane, as `make bench` wrote them."""
    page = (ROOT / "docs/overhead.md").read_text(encoding="utf-8")
    section = page.partition("<!-- instructions: begin -->")[2].partition("<!-- instructions: end -->")[0]
    found: dict[str, list[float]] = {}
    for mechanism, _, value in _ROW.findall(section):
        found.setdefault(mechanism, []).append(float(value.replace(",", "")))
    return found


def test_auto_tries_the_cheapest_first() -> None:
    """Of two mechanisms that follow each other the first costs less: timed or not, on both data planes, all in all."""
    found = costs()
    order = [part.mechanism for part in PARTS if part.signal == "lookup"]
    assert found.keys() == set(order)
    for first, second in itertools.pairwise(order):
        assert len(found[first]) == len(found[second]) == 4
        assert sum(found[first]) < sum(found[second]), found
