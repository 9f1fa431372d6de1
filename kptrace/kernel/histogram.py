# SPDX-License-Identifier: Apache-2.0
"""The kernel's histogram slots, and the fixed ladders they are exposed on.

In the kernel a histogram has four linear steps per power of two, from 16 ns on; `bpf/include/kptrace/hist.h` has the
same arithmetic. Slot k holds durations in (lo, hi] nanoseconds, so that `le` is true: an upper edge belongs to its
slot.
"""

import math
from collections.abc import Sequence

#: The first slot is (0, 16] ns: 2**FIRST_BITS.
FIRST_BITS = 4
STEPS = 4
#: Octaves above the first slot: the last edge is 2**(4 + 27) ns, about 2.1 s; the last slot is everything above.
OCTAVES = 27
SLOTS = 1 + STEPS * OCTAVES + 1

#: Edges of the lookup ladder in seconds, denser from 0.5 to 8 us: 16 edges with +Inf.
LOOKUP_LADDER_NS = (
    64,
    128,
    256,
    512,
    768,
    1024,
    1536,
    2048,
    3072,
    4096,
    8192,
    16384,
    65536,
    1 << 20,
    1 << 24,
)
#: Eight edges with +Inf, for one histogram per service.
SERVICE_LADDER_NS = (512, 1024, 2048, 4096, 8192, 32768, 262144)


def slot_of(duration_ns: int) -> int:
    """The slot that a duration falls into: a mirror of `hist_slot` in hist.h."""
    if duration_ns <= 1 << FIRST_BITS:
        return 0
    # (lo, hi] becomes [lo, hi) when one is taken off; the octave is then the position of the highest bit.
    value = duration_ns - 1
    octave = value.bit_length() - 1 - FIRST_BITS
    if octave >= OCTAVES:
        return SLOTS - 1
    step = value >> (octave + FIRST_BITS - 2) & (STEPS - 1)
    return 1 + octave * STEPS + step


def on_ladder(slots: Sequence[int], ladder_ns: Sequence[int]) -> tuple[tuple[float, int], ...]:
    """Cumulative `(le in seconds, count)` of a kernel histogram on a ladder whose edges are slot edges."""
    buckets = []
    total = 0
    following = 0
    for edge in ladder_ns:
        last = slot_of(edge)
        total += sum(slots[following : last + 1])
        following = last + 1
        buckets.append((edge / 1e9, total))
    buckets.append((math.inf, total + sum(slots[following:])))
    return tuple(buckets)
