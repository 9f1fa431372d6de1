# SPDX-License-Identifier: Apache-2.0
"""From the memory of the datapath's maps to metric samples: pure, and a mirror of the layout in bpf/program_run.bpf.c."""

from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, NamedTuple

from kptrace.kernel.histogram import LOOKUP_LADDER_NS, SLOTS, on_ladder
from kptrace.model.metrics import HistogramSample, Sample
from kptrace.model.netfilter import DataPlane
from kptrace.signals.lookup_cells import (
    CELL_BYTES,
    COUNT_KINDS,
    SUM_WORD,
    UNPAIRED_REASONS,
    VERDICTS,
    WORDS,
)

#: Groups of programs that are counted together: more than there are kinds; the last is nobody's.
GROUPS: Final = 64
FLOOR_GROUP: Final = GROUPS - 1
FAMILIES: Final = ("ipv4", "ipv6", "other")
CELLS_PER_GROUP: Final = len(FAMILIES) * len(VERDICTS)
GROUP_BYTES: Final = CELLS_PER_GROUP * CELL_BYTES
MECHANISM: Final = "fentry"
TABLE: Final = "bpf"
#: The hook whose every run is the first of a connection; at the others first packets and the rest come alike.
FIRST_HOOK: Final = "cgroup_connect"
RECURSION_MISS: Final = "recursion_miss"
#: Queueing is netfilter's.
_REASONS: Final = UNPAIRED_REASONS[1:]


class Group(NamedTuple):
    """What is counted together, whatever endpoint or device it is of: labels of its samples."""

    hook: str
    chain: str

    @property
    def walk(self) -> str:
        """The label of that name."""
        return "first" if self.hook == FIRST_HOOK else "all"


class GroupNumbers:
    """A number for each group, kept for ever: its cells in the kernel never belong to another."""

    def __init__(self) -> None:
        """No group has a number yet."""
        # Scrapes iterate over it in other threads: it is replaced, never changed.
        self.numbers: Mapping[Group, int] = {}

    def number(self, group: Group) -> int:
        """The group's number, given now if it has none; there are fewer kinds of programs than numbers."""
        if group not in self.numbers:
            self.numbers = {**self.numbers, group: len(self.numbers)}
        return self.numbers[group]


def group_words(memory: memoryview, number: int) -> "array[int]":
    """The words of all cells of a group."""
    return array("Q", bytes(memory[number * GROUP_BYTES : (number + 1) * GROUP_BYTES]))


def lookup_samples(memory: memoryview, groups: Mapping[Group, int]) -> Iterable[HistogramSample]:
    """A histogram for every cell that has a sample.

    Args:
        memory: of the map `cells`.
        groups: and their numbers.
    """
    for group, number in sorted(groups.items()):
        words = group_words(memory, number)
        for cell in range(CELLS_PER_GROUP):
            slots = words[cell * WORDS : cell * WORDS + SLOTS]
            if any(slots):
                family, verdict = divmod(cell, len(VERDICTS))
                labels = (
                    MECHANISM,
                    DataPlane.CILIUM.value,
                    FAMILIES[family],
                    group.hook,
                    TABLE,
                    group.chain,
                    group.walk,
                    "none",
                    VERDICTS[verdict],
                    "host",
                )
                yield HistogramSample(
                    labels, on_ladder(slots, LOOKUP_LADDER_NS), words[cell * WORDS + SUM_WORD] / 1e9
                )


def mean_ns(words: Sequence[int]) -> float | None:
    """The mean of all cells of a group; None where it has no sample."""
    count = sum(sum(words[at : at + SLOTS]) for at in range(0, len(words), WORDS))
    return sum(words[SUM_WORD::WORDS]) / count if count else None


def unpaired_samples(
    memory: memoryview, groups: Mapping[Group, int], misses: Mapping[str, int]
) -> list[Sample]:
    """The losses by hook and reason; zero for every hook that was measured.

    Args:
        memory: of the map `counts`.
        groups: and their numbers.
        misses: by hook, what the kernel itself counted of programs that it did not run.
    """
    words = array("Q", bytes(memory[: GROUPS * COUNT_KINDS * 8]))
    totals: dict[tuple[str, str], int] = {}
    for group, number in groups.items():
        for kind, reason in enumerate(UNPAIRED_REASONS):
            if reason in _REASONS:
                key = (group.hook, reason)
                totals[key] = totals.get(key, 0) + words[number * COUNT_KINDS + kind]
        totals.setdefault((group.hook, RECURSION_MISS), 0)
    for hook, count in misses.items():
        totals[hook, RECURSION_MISS] = count
    return [Sample(key, float(value)) for key, value in sorted(totals.items())]
