# SPDX-License-Identifier: Apache-2.0
"""The estimate of cost, and the sampling that follows from it."""

import pytest
from structlog import get_logger
from structlog.testing import capture_logs

from kptrace.signals.lookup_govern import Costs, Governed, OverheadGovernor
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


def test_what_a_period_changed_is_said_and_logged_once() -> None:
    """A quiet period changes nothing; one over the budget the sampling, and at last whether anything is attached."""
    clock, opened, changes = Clock(), 0, []
    governor = OverheadGovernor(Sampling(1, 64), 0.001, Costs(200.0, 50.0), clock)
    with capture_logs() as logs:
        clock.now += 1.0
        assert governor.govern((0, 0), get_logger()) == Governed(sampling=False, attached=False)
        assert logs == []
        while governor.attached:
            clock.now += 1.0
            opened += 1_000_000
            changes.append(governor.govern((0, opened), get_logger()))
    assert changes[0] == Governed(sampling=True, attached=False)
    assert changes[-1] == Governed(sampling=True, attached=True)
    assert [each["event"] for each in logs] == ["sampling_changed"] * len(changes)
    assert logs[0]["factor"] == 2
