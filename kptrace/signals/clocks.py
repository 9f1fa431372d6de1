# SPDX-License-Identifier: Apache-2.0
"""From CLOCK_MONOTONIC, which the kernel's stamps are in, to the time of day."""

import time
from collections.abc import Callable
from typing import Final

_TRIES: Final = 5


def unix_ns(
    at_ns: int,
    *,
    clock: Callable[[], int] = time.monotonic_ns,
    wall: Callable[[], int] = time.time_ns,
) -> int:
    """Nanoseconds since 1970 of a CLOCK_MONOTONIC stamp, as the time of day is set now.

    The two clocks cannot be read at once: of several readings the one that was interrupted least is taken.
    """
    readings = []
    for _ in range(_TRIES):
        before, now, after = clock(), wall(), clock()
        readings.append((after - before, now - (before + after) // 2))
    return min(readings)[1] + at_ns
