# SPDX-License-Identifier: Apache-2.0
"""Metric families of look-ups by function: the same metrics as a bracket's, with more of the labels in use. Pure."""

from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from kptrace.kernel.histogram import LOOKUP_LADDER_NS, SLOTS, on_ladder
from kptrace.model.metrics import HistogramSample, MetricFamily, Sample
from kptrace.model.signal import MechanismState
from kptrace.signals import lookup_cells as cells
from kptrace.signals.lookup_families import BUDGET_SPEC, OVERHEAD_SPEC, SAMPLING_SPEC
from kptrace.signals.lookup_function_kernel import Misses
from kptrace.signals.lookup_function_places import Place

SPECS = (cells.LOOKUP_SPEC, cells.UNPAIRED_SPEC, SAMPLING_SPEC, OVERHEAD_SPEC, BUDGET_SPEC)
#: The hook of losses that the kernel counts by function only.
ANY_HOOK = "~any"
RECURSION_MISS = "recursion_miss"
KPROBE_MISS = "kprobe_miss"

#: What is exposed, and the numbers that are counted under it.
Exposed = Mapping[Place, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Published:
    """What scrapes read: replaced as a whole by the loop's thread.

    Attributes:
        state: of the mechanism.
        ratios: sampled share of first packets and of the rest.
        overhead, budget: share of one core.
    """

    state: MechanismState
    ratios: tuple[float, float] = (0.0, 0.0)
    overhead: float = 0.0
    budget: float = 0.0


def missed(misses: Misses) -> Mapping[str, int]:
    """What the kernel itself counted, by reason; a kernel that does not count passed-by kprobes has no such row."""
    kprobes = {} if misses.kprobe is None else {KPROBE_MISS: misses.kprobe}
    return {RECURSION_MISS: misses.recursion, **kprobes}


def lookup_samples(memory: memoryview, places: Exposed, mechanism: str) -> Iterable[HistogramSample]:
    """A histogram for every cell that has a sample; places that are called the same are one."""
    for place, numbers in places.items():
        words = _sum(_cells(memory, number) for number in numbers)
        for cell in range(cells.CELLS_PER_BRACKET):
            slots = words[cell * cells.WORDS : cell * cells.WORDS + SLOTS]
            if any(slots):
                yield HistogramSample(
                    cells.cell_labels(place.labels, cell, mechanism, place.netns),
                    on_ladder(slots, LOOKUP_LADDER_NS),
                    words[cell * cells.WORDS + cells.SUM_WORD] / 1e9,
                )


def unpaired_samples(
    counts: memoryview, places: Exposed, missed: Mapping[str, int], *, returns_told: bool
) -> list[Sample]:
    """The losses by hook and reason.

    Args:
        counts: memory of the map.
        places: what is counted there.
        missed: what the kernel itself counted, by reason.
        returns_told: whether the kernel counts returns that no program saw. Where it does, a slot that such a return left
            behind is not counted once more when it is found.
    """
    words = array("Q", bytes(counts[: cells.COUNT_KINDS * 8 * 256]))
    totals = {(ANY_HOOK, reason): count for reason, count in missed.items()}
    for place, numbers in places.items():
        for kind, reason in enumerate(cells.UNPAIRED_REASONS):
            if reason == "queued" or (reason == "stolen_or_in_flight" and returns_told):
                continue
            key = (place.labels.hook.label, reason)
            lost = sum(words[number * cells.COUNT_KINDS + kind] for number in numbers)
            totals[key] = totals.get(key, 0) + lost
    return [Sample(key, float(value)) for key, value in sorted(totals.items())]


def own_families(seen: Published) -> Iterable[MetricFamily]:
    """What the signal says of itself."""
    first, rest = seen.ratios
    yield MetricFamily(SAMPLING_SPEC, [Sample(("lookup", "first"), first), Sample(("lookup", "rest"), rest)])
    yield MetricFamily(OVERHEAD_SPEC, [Sample(("lookup",), seen.overhead)])
    yield MetricFamily(BUDGET_SPEC, [Sample(("lookup",), seen.budget)])


def _cells(memory: memoryview, number: int) -> "array[int]":
    size = cells.CELLS_PER_BRACKET * cells.CELL_BYTES
    return array("Q", bytes(memory[number * size : (number + 1) * size]))


def _sum(rows: Iterable["array[int]"]) -> "array[int]":
    total = array("Q")
    for row in rows:
        total = array("Q", map(int.__add__, total, row)) if total else row
    return total
