# SPDX-License-Identifier: Apache-2.0
"""Commits that nobody traced are counted exactly, and none is ever made up."""

from collections import deque
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kptrace.model.rewrite import Outcome
from kptrace.signals.rewrite_generation import GenerationWatch

WRAP = 1 << 32


@dataclass
class Node:
    """A ruleset with traced and untraced commits; traced ones wait in the ring until they are taken in.

    Attributes:
        generation: the kernel's, or None while it does not answer.
        busy: whether a transaction is under way.
        between: commits that come between the two questions of one comparison.
    """

    generation: int | None = 1
    busy: bool = False
    between: int = 0
    waiting: deque[Outcome] = field(default_factory=deque)
    watch: GenerationWatch = field(init=False)

    def __post_init__(self) -> None:
        """Begin to watch."""
        self.watch = GenerationWatch(lambda: self.generation, self.catch_up, lambda: self.busy)

    def catch_up(self) -> None:
        """Hand the waiting records over."""
        while self.waiting:
            self.watch.traced(self.waiting.popleft())
        self.move(self.between)

    def move(self, commits: int) -> None:
        """Others' commits, which nobody traces."""
        if self.generation is not None:
            self.generation = (self.generation + commits) % WRAP

    def traced(self, *outcomes: Outcome) -> None:
        """Transactions that are traced; the committed ones move the generation."""
        for outcome in outcomes:
            self.waiting.append(outcome)
            self.move(outcome is Outcome.COMMITTED)


def test_the_first_comparison_finds_nothing() -> None:
    """What was committed before kptrace began is nobody's fault."""
    node = Node(generation=4711)
    assert node.watch.generation is None
    assert node.watch.tick() == 0
    assert node.watch.generation == 4711


def test_traced_commits_are_explained() -> None:
    """Each committed transaction explains one step, those that changed nothing explain none."""
    node = Node()
    node.watch.tick()
    node.traced(Outcome.COMMITTED, Outcome.CHECKED, Outcome.EMPTY, Outcome.FAILED, Outcome.COMMITTED)
    node.move(3)
    assert node.watch.tick() == 3
    assert node.watch.tick() == 0
    assert node.watch.untraced == 3
    assert node.watch.generation == 6


@pytest.mark.parametrize("outcome", [Outcome.CHECKED, Outcome.EMPTY, Outcome.FAILED])
def test_what_did_not_commit_hides_no_commit(outcome: Outcome) -> None:
    """A dry run beside somebody's untraced commit does not explain it."""
    node = Node()
    node.watch.tick()
    node.traced(outcome)
    node.move(1)
    assert node.watch.tick() == 1


def test_a_transaction_of_unknown_end_may_have_been_the_commit() -> None:
    """It is given the benefit of the doubt, whether it committed or not."""
    node = Node()
    node.watch.tick()
    node.traced(Outcome.UNKNOWN, Outcome.UNKNOWN)
    node.move(1)
    assert node.watch.tick() == 0
    assert node.watch.untraced == 0


def test_an_unused_explanation_explains_nothing_later() -> None:
    """A doubtful transaction of one interval does not hide a commit of the next."""
    node = Node()
    node.watch.tick()
    node.traced(Outcome.UNKNOWN)
    assert node.watch.tick() == 0
    node.move(1)
    assert node.watch.tick() == 1


def test_a_transaction_under_way_puts_the_comparison_off() -> None:
    """Its commit may be in the generation before its record is there: nothing is counted, and nothing is forgotten."""
    node = Node()
    node.watch.tick()
    node.move(2)
    node.busy = True
    assert node.watch.tick() == 0
    assert node.watch.generation == 3
    node.move(1)
    node.busy = False
    node.traced(Outcome.COMMITTED)
    assert node.watch.tick() == 3


def test_a_commit_between_the_questions_puts_the_comparison_off() -> None:
    """The records that were taken in may or may not have its own; the next quiet moment tells."""
    node = Node(between=1)
    node.watch.tick()
    assert node.watch.generation == 2
    node.between = 0
    assert node.watch.tick() == 0
    node.between = 1
    node.traced(Outcome.COMMITTED)
    assert node.watch.tick() == 0
    node.between = 0
    assert node.watch.tick() == 1


def test_an_unanswered_question_counts_nothing() -> None:
    """Without an answer the generation is unknown; what was committed meanwhile is counted when it comes again."""
    node = Node()
    node.watch.tick()
    node.generation = None
    assert node.watch.tick() == 0
    assert node.watch.generation is None
    node.generation = 4
    assert node.watch.tick() == 3


@pytest.mark.parametrize("begin", [WRAP - 3, WRAP - 1, 0])
def test_the_generation_may_wrap(begin: int) -> None:
    """It has 32 bits."""
    node = Node(generation=begin)
    node.watch.tick()
    node.traced(Outcome.COMMITTED, Outcome.COMMITTED)
    node.move(3)
    assert node.watch.tick() == 3


def test_a_generation_that_begins_anew_is_no_flood_of_commits() -> None:
    """When nf_tables is loaded again the generation is 1: nothing is missing, and the comparison goes on from there."""
    node = Node(generation=1000)
    node.watch.tick()
    node.generation = 1
    assert node.watch.tick() == 0
    node.move(2)
    assert node.watch.tick() == 2
    assert node.watch.untraced == 2


steps = st.lists(
    st.tuples(
        st.lists(
            st.sampled_from([Outcome.COMMITTED, Outcome.EMPTY, Outcome.FAILED, Outcome.CHECKED]), max_size=4
        ),
        st.integers(0, 5),
        st.booleans(),
        st.integers(0, 2),
    ),
    max_size=10,
)


@settings(deadline=None)  # a busy machine is no failure
@given(st.integers(0, WRAP - 1), steps)
def test_every_untraced_commit_is_counted_once(
    begin: int, moments: list[tuple[list[Outcome], int, bool, int]]
) -> None:
    """However comparisons are put off, in the end exactly the untraced commits are missing."""
    node = Node(generation=begin)
    node.watch.tick()
    missed = found = 0
    for outcomes, others, busy, between in moments:
        node.traced(*outcomes)
        node.move(others)
        node.busy, node.between = busy, between
        found += node.watch.tick()
        missed += others + (0 if busy else between)
        assert found <= missed
    node.busy, node.between = False, 0
    found += node.watch.tick()
    assert found == node.watch.untraced == missed
