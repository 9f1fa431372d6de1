# SPDX-License-Identifier: Apache-2.0
"""Samples and losses from the kernel's memory: the same metrics as a bracket's, places of one name together."""

import struct
from array import array

from kptrace.model.metrics import HistogramSample
from kptrace.model.netfilter import DataPlane, Hook, IpFamily
from kptrace.signals.lookup_cells import (
    CELL_BYTES,
    CELLS_PER_BRACKET,
    COUNT_KINDS,
    LOOKUP_SPEC,
    BracketLabels,
)
from kptrace.signals.lookup_function_families import SPECS, lookup_samples, missed, unpaired_samples
from kptrace.signals.lookup_function_kernel import Misses
from kptrace.signals.lookup_function_places import PLACES, Place

HOST = Place(False, BracketLabels(DataPlane.NFTABLES, IpFamily.IPV4, Hook.OUTPUT, "kube-proxy", "nat-output"))
POD = Place(True, BracketLabels(DataPlane.IPTABLES_LEGACY, IpFamily.IPV6, Hook.INPUT, "filter", "INPUT"))


class Memory:
    """The maps' values."""

    def __init__(self) -> None:
        self.cells = bytearray(PLACES * CELLS_PER_BRACKET * CELL_BYTES)
        self.counts = array("Q", bytes(PLACES * COUNT_KINDS * 8))

    def add(self, place: int, cell: int, slot: int, count: int, total_ns: int) -> None:
        """Samples of one slot."""
        base = (place * CELLS_PER_BRACKET + cell) * CELL_BYTES
        struct.pack_into("=Q", self.cells, base + slot * 8, count)
        struct.pack_into("=Q", self.cells, base + CELL_BYTES - 8, total_ns)


def test_places_of_one_name_are_one_histogram() -> None:
    """Counts and sums are added; walk, state and verdict are as the bracket has them."""
    memory = Memory()
    memory.add(3, 0 * 10 + 2 * 2 + 0, 5, 7, 700)  # first, new, accept
    memory.add(9, 0 * 10 + 2 * 2 + 0, 6, 4, 300)
    memory.add(170, 1 * 10 + 0 * 2 + 1, 0, 2, 20)  # rest, established, drop
    exposed = {HOST: (3, 9), POD: (170,)}
    samples = list(lookup_samples(memoryview(memory.cells), exposed, "fentry"))
    assert all(isinstance(sample, HistogramSample) for sample in samples)
    rows = [dict(zip(LOOKUP_SPEC.labels, sample.labels, strict=True)) for sample in samples]
    assert rows[0] == {
        "mechanism": "fentry",
        "dataplane": "nftables",
        "family": "ipv4",
        "hook": "output",
        "table": "kube-proxy",
        "chain": "nat-output",
        "walk": "first",
        "ct_state": "new",
        "verdict": "accept",
        "netns": "host",
    }
    assert (samples[0].count, samples[0].sum) == (11, 1000 / 1e9)
    assert (rows[1]["netns"], rows[1]["walk"], rows[1]["verdict"]) == ("pod", "rest", "drop")
    assert samples[1].count == 2
    assert len(samples) == 2


def test_losses_have_the_kernels_own_counts() -> None:
    """What the kernel counts is of no hook; an abandoned slot is a loss only where missed returns are not told."""
    memory = Memory()
    memory.counts[9 * COUNT_KINDS + 1] = 5  # stolen_or_in_flight
    memory.counts[9 * COUNT_KINDS + 2] = 6  # evicted
    memory.counts[3 * COUNT_KINDS + 3] = 1  # opened_elsewhere
    exposed = {HOST: (3, 9), POD: (170,)}
    counts = memoryview(memory.counts).cast("B")

    def losses(misses: Misses, *, told: bool) -> dict[tuple[str, ...], float]:
        rows = unpaired_samples(counts, exposed, missed(misses), returns_told=told)
        return {row.labels: row.value for row in rows}

    told = losses(Misses(4, 2), told=True)
    assert told["~any", "recursion_miss"] == 4
    assert told["~any", "kprobe_miss"] == 2
    assert (told["output", "evicted"], told["output", "opened_elsewhere"]) == (6, 1)
    assert told["input", "evicted"] == 0
    assert not any("stolen_or_in_flight" in labels or "queued" in labels for labels in told)
    untold = losses(Misses(0), told=False)
    assert untold["output", "stolen_or_in_flight"] == 5
    assert ("~any", "kprobe_miss") not in untold


def test_all_families_are_described() -> None:
    """Names are the bracket's: whoever queries them need not know the mechanism."""
    assert {spec.name for spec in SPECS} == {
        "kptrace_lookup_duration_seconds",
        "kptrace_lookup_unpaired_total",
        "kptrace_sampling_ratio",
        "kptrace_overhead_ratio",
        "kptrace_overhead_budget_ratio",
    }
