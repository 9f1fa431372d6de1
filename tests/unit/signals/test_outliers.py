# SPDX-License-Identifier: Apache-2.0
"""What counts as slow."""

from hypothesis import given
from hypothesis import strategies as st

from kptrace.signals.outliers import MAX_LANES, WINDOW, Limits, Outliers

LIMITS = Limits(least_ns=100, always_ns=10_000, times=3.0, enough=4)


def test_slow_is_three_times_the_usual() -> None:
    """Compared with the median of what came before, once there is enough of it."""
    outliers = Outliers(LIMITS)
    assert not any(outliers.judge("a", duration) for duration in (90, 2_000, 100, 110))
    assert outliers.usual_ns("a") == 105
    assert not outliers.judge("a", 314)
    assert outliers.judge("a", 331)
    assert not outliers.judge("b", 331)


def test_what_is_quick_is_never_slow_and_what_is_long_always() -> None:
    """Five times almost nothing is nothing; ten seconds are slow even if they are usual."""
    outliers = Outliers(LIMITS)
    assert not any(outliers.judge("a", 10) for _ in range(5))
    assert not outliers.judge("a", 99)
    assert outliers.judge("new", 10_000)


@given(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 20_000)), max_size=600))
def test_memory_is_bounded(seen: list[tuple[int, int]]) -> None:
    """Whatever comes, no more lanes and durations are kept than the limits say."""
    outliers = Outliers(LIMITS)
    for lane, duration in seen:
        outliers.judge(lane, duration)
    kept = outliers._lanes
    assert len(kept) <= MAX_LANES
    assert all(len(each) <= WINDOW for each in kept.values())
