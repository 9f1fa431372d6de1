# SPDX-License-Identifier: Apache-2.0
"""The estimate of cost, and the sampling that follows from it."""

import pytest

from kptrace.signals.lookup_govern import Costs, OverheadGovernor
from kptrace.signals.sampling import Sampling


class Clock:
    """Seconds that only the test moves."""

    now = 0.0

    def __call__(self) -> float:
        """The time."""
        return self.now


def test_cost_is_of_sampled_and_of_skipped_packets() -> None:
    """At 1 in 64 each sampled packet stands for 63 more that were looked at."""
    clock = Clock()
    governor = OverheadGovernor(Sampling(1, 64), 0.0, Costs(200.0, 50.0), clock)
    clock.now = 2.0
    assert not governor.step((1000, 500))
    assert governor.overhead == pytest.approx((1500 * 200 + 500 * 63 * 50) / 1e9 / 2)
    clock.now = 4.0
    governor.step((1000, 500))
    assert governor.overhead == 0
    assert governor.ratios() == (1.0, 1 / 64)


def test_a_budget_thins_and_detaches_at_last() -> None:
    """The divisor doubles while the budget is passed; at its limit nothing is attached any more."""
    clock = Clock()
    governor = OverheadGovernor(Sampling(1, 64), 0.001, Costs(200.0, 50.0), clock)
    opened, factors = 0, []
    while governor.attached:
        clock.now += 1.0
        opened += 1_000_000
        assert governor.step((0, opened))
        factors.append(governor.factor)
    assert factors[:3] == [2, 4, 8]
    assert factors[-1] == 0
