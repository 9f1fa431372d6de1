# SPDX-License-Identifier: Apache-2.0
"""A run's time, divided among phases: each nanosecond belongs to one, so that they add up. Pure."""

from collections import Counter
from collections.abc import Iterable
from typing import Final, NamedTuple

from kptrace.signals.sync_events import Phase

#: What a nanosecond belongs to where several things went on in it, the first of these; COMPUTE where nothing did.
_ORDER: Final = (
    Phase.COMMIT,
    Phase.LOCK_WAIT,
    Phase.TEARDOWN,
    Phase.WRITE,
    Phase.LIST,
    Phase.CONNTRACK,
)


class Interval(NamedTuple):
    """Something that went on."""

    begin_ns: int
    end_ns: int
    phase: Phase


def divide(begin_ns: int, end_ns: int, intervals: Iterable[Interval]) -> dict[Phase, int]:
    """Nanoseconds of each phase that took any, between two moments."""
    edges: list[tuple[int, int, Phase]] = []
    for begin, end, phase in intervals:
        first, last = max(begin, begin_ns), min(end, end_ns)
        if first < last:
            edges += [(first, 1, phase), (last, -1, phase)]
    found: dict[Phase, int] = {}
    going_on: Counter[Phase] = Counter()
    at = begin_ns
    for edge, step, phase in sorted(edges):
        if edge > at:
            now = next((each for each in _ORDER if going_on[each]), Phase.COMPUTE)
            found[now] = found.get(now, 0) + edge - at
            at = edge
        going_on[phase] += step
    if end_ns > at:
        found[Phase.COMPUTE] = found.get(Phase.COMPUTE, 0) + end_ns - at
    return found
