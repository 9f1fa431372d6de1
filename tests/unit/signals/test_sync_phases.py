# SPDX-License-Identifier: Apache-2.0
"""A run's time is divided among phases: all of it, and none of it twice."""

from hypothesis import given
from hypothesis import strategies as st

from kptrace.signals.sync_events import Phase
from kptrace.signals.sync_phases import Interval, divide

intervals = st.lists(
    st.builds(Interval, st.integers(0, 60), st.integers(0, 60), st.sampled_from(list(Phase))), max_size=12
)


def test_what_nothing_went_on_in_is_computing() -> None:
    """Before, between and behind."""
    parts = [Interval(2, 4, Phase.LIST), Interval(6, 7, Phase.COMMIT)]
    assert divide(0, 10, parts) == {Phase.COMPUTE: 7, Phase.LIST: 2, Phase.COMMIT: 1}


def test_the_commit_is_never_hidden() -> None:
    """Another process of the run may list meanwhile, or wait."""
    parts = [Interval(0, 10, Phase.LIST), Interval(2, 8, Phase.WRITE), Interval(4, 5, Phase.COMMIT)]
    assert divide(0, 10, parts) == {Phase.LIST: 4, Phase.WRITE: 5, Phase.COMMIT: 1}


def test_a_run_without_length_has_no_phases() -> None:
    """Nothing is divided by nothing."""
    assert divide(5, 5, [Interval(0, 9, Phase.LIST)]) == {}


@given(st.integers(0, 60), st.integers(0, 60), intervals)
def test_phases_add_up(begin: int, length: int, parts: list[Interval]) -> None:
    """Whatever overlaps, and wherever it lies."""
    found = divide(begin, begin + length, parts)
    assert sum(found.values()) == length
    assert all(took > 0 for took in found.values())


@given(intervals)
def test_each_moment_has_one_phase(parts: list[Interval]) -> None:
    """The same as asking each nanosecond who had it."""
    order = [Phase.COMMIT, Phase.LOCK_WAIT, Phase.TEARDOWN, Phase.WRITE, Phase.LIST, Phase.CONNTRACK]
    slow: dict[Phase, int] = {}
    for at in range(60):
        here = {phase for begin, end, phase in parts if begin <= at < end}
        phase = next((each for each in order if each in here), Phase.COMPUTE)
        slow[phase] = slow.get(phase, 0) + 1
    assert divide(0, 60, parts) == slow
