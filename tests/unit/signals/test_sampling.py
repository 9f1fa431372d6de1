# SPDX-License-Identifier: Apache-2.0
"""Divisors and the governor that keeps their cost within the budget."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kptrace.model.errors import UsageError
from kptrace.signals.sampling import ALWAYS, MAX_DIVISOR, Governor, Sampling


@pytest.mark.parametrize(
    ("text", "sampling"), [("all", Sampling(1, 1)), ("64", Sampling(1, 64)), ("4:128", Sampling(4, 128))]
)
def test_divisors_are_read(text: str, sampling: Sampling) -> None:
    """`all`, one divisor and two are understood."""
    assert Sampling.parse(text) == sampling


@pytest.mark.parametrize("text", ["", "0", "-1", "1:2:3", "x", "1:", "65537"])
def test_other_words_are_refused(text: str) -> None:
    """Anything else is one clear error."""
    with pytest.raises(UsageError, match="not a divisor"):
        Sampling.parse(text)


def test_all_means_every_packet() -> None:
    """A divisor of one lets every 32-bit random number pass."""
    assert Sampling(1, 1).thresholds() == (ALWAYS, ALWAYS)
    assert Sampling(1, 64).thresholds() == (ALWAYS, ALWAYS // 64)


@given(st.floats(min_value=1e-4, max_value=0.5), st.integers(min_value=1, max_value=4096))
def test_a_flood_detaches_and_calm_brings_back(budget: float, rest: int) -> None:
    """Under a cost that never falls the divisors rise until the brackets detach; in calm all comes back as it was."""
    wanted = Sampling(1, rest)
    governor = Governor(wanted, budget)
    for _ in range(40):
        governor = governor.step(budget * 2)
        assert governor.sampling().rest <= MAX_DIVISOR
    assert not governor.attached
    for _ in range(400):
        governor = governor.step(0.0)
    assert governor.attached
    assert governor.sampling() == wanted


@given(st.lists(st.floats(min_value=0, max_value=1), max_size=60))
def test_first_packets_are_thinned_last(costs: list[float]) -> None:
    """First packets are never sampled thinner than the others."""
    governor = Governor(Sampling(), 0.01)
    for cost in costs:
        governor = governor.step(cost)
        assert governor.sampling().first <= governor.sampling().rest


def test_a_cost_near_the_budget_changes_nothing() -> None:
    """Between a quarter of the budget and the budget the divisors rest: they do not swing."""
    governor = Governor(Sampling(), 0.01, factor=4)
    for _ in range(20):
        governor = governor.step(0.005)
    assert governor.factor == 4
