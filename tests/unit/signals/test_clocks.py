# SPDX-License-Identifier: Apache-2.0
"""A stamp of one clock as a time of the other."""

import time
from collections.abc import Iterator

from kptrace.signals.clocks import unix_ns


def test_the_least_disturbed_reading_is_taken() -> None:
    """A reading that was interrupted tells the difference of the clocks only roughly."""
    interrupted, good = [1000, 9000], [9100, 9102]
    clock: Iterator[int] = iter([*interrupted, *good, *interrupted * 3])
    walls = iter([5_001_000, 5_009_101, 0, 0, 0])
    assert unix_ns(10_000, clock=lambda: next(clock), wall=lambda: next(walls)) == 5_010_000


def test_now_is_now() -> None:
    """On this machine's own clocks, between two readings of the time of day."""
    before = time.time_ns()
    found = unix_ns(time.monotonic_ns())
    assert before - 10_000_000 <= found <= time.time_ns() + 10_000_000
