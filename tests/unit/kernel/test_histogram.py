# SPDX-License-Identifier: Apache-2.0
"""Slots and edges agree with each other and with the C that runs in the kernel."""

import ctypes
import math
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kptrace.kernel import histogram as h

DURATIONS = st.integers(min_value=0, max_value=1 << 40)
BPF_INCLUDE = Path(__file__).parents[3] / "bpf/include"


@pytest.fixture(scope="module")
def c_slots(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """hist.h and service.h's slot functions, compiled for this machine."""
    folder = tmp_path_factory.mktemp("hist")
    source = folder / "slots.c"
    service = (BPF_INCLUDE / "kptrace/service.h").read_text()
    begin = service.index("static __always_inline u32 service_slot")
    end = service.index("}\n", begin) + 2
    source.write_text(
        "typedef unsigned long long u64; typedef unsigned int u32;\n#define __always_inline inline\n"
        "#include <kptrace/hist.h>\n" + service[begin:end] + "u32 hist(u64 d) { return hist_slot(d); }\n"
        "u32 service(u64 d) { return service_slot(d); }\n"
    )
    library = folder / "slots.so"
    subprocess.run(["gcc", "-shared", "-fPIC", f"-I{BPF_INCLUDE}", "-o", library, source], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.hist.argtypes = loaded.service.argtypes = [ctypes.c_uint64]
    return loaded


def upper_edge_ns(slot: int) -> float:
    """The inclusive upper edge of a slot in nanoseconds; infinity for the last."""
    if slot == 0:
        return 1 << h.FIRST_BITS
    if slot >= h.SLOTS - 1:
        return math.inf
    octave, step = divmod(slot - 1, h.STEPS)
    return (1 << (octave + h.FIRST_BITS)) + ((step + 1) << (octave + h.FIRST_BITS - 2))


@given(DURATIONS)
def test_a_duration_lies_in_its_slot(duration: int) -> None:
    """A duration is at most its slot's upper edge, and above the edge of the slot below."""
    slot = h.slot_of(duration)
    assert 0 <= slot < h.SLOTS
    assert duration <= upper_edge_ns(slot)
    assert slot == 0 or duration > upper_edge_ns(slot - 1)


@given(DURATIONS)
def test_the_kernel_has_the_same_slots(c_slots: ctypes.CDLL, duration: int) -> None:
    """hist.h and histogram.py put every duration into the same slot."""
    assert c_slots.hist(duration) == h.slot_of(duration)


@given(DURATIONS)
def test_service_slots_are_the_exposed_edges(c_slots: ctypes.CDLL, duration: int) -> None:
    """A service's slot is the first exposed edge that is not below the duration."""
    expected = next(
        (slot for slot, edge in enumerate(h.SERVICE_LADDER_NS) if duration <= edge), len(h.SERVICE_LADDER_NS)
    )
    assert c_slots.service(duration) == expected


def test_ladders_stand_on_slot_edges() -> None:
    """Every exposed edge is a slot's edge, so that `le` is exact; no ladder has more edges than it may."""
    edges = {upper_edge_ns(slot) for slot in range(h.SLOTS)}
    assert set(h.LOOKUP_LADDER_NS) <= edges
    assert len(h.LOOKUP_LADDER_NS) + 1 <= 16
    assert len(h.SERVICE_LADDER_NS) + 1 <= 8
    assert list(h.LOOKUP_LADDER_NS) == sorted(set(h.LOOKUP_LADDER_NS))


@given(st.lists(DURATIONS, max_size=200))
def test_cumulative_counts_are_true(durations: list[int]) -> None:
    """The count at each edge is the number of durations not above it."""
    slots = [0] * h.SLOTS
    for duration in durations:
        slots[h.slot_of(duration)] += 1
    for edge, count in h.on_ladder(slots, h.LOOKUP_LADDER_NS):
        assert count == sum(1 for duration in durations if math.isinf(edge) or duration <= round(edge * 1e9))
