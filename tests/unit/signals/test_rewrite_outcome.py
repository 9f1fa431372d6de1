# SPDX-License-Identifier: Apache-2.0
"""How a transaction ended: the sender's own error first, then the batch's bytes, then the sequence."""

from itertools import product

import pytest

from kptrace.dataplanes.nftables.batch import BatchKind
from kptrace.model.rewrite import Outcome
from kptrace.signals.rewrite_outcome import ANSWERS_SEEN, batch_outcome, replace_outcome
from kptrace.signals.rewrite_records import Flag, Kind, Transaction

NONE = Flag(0)
ANY_FLAGS = [Flag(bits) for bits in range(2 * max(Flag))]


def seen(
    *,
    moved: bool = False,
    flags: Flag = NONE,
    error: int = 0,
    result: int = 100,
    answers: int = 0,
    kind: Kind = Kind.VECTOR,
) -> Transaction:
    """A transaction as the kernel side saw it."""
    return Transaction(
        kind=kind,
        tgid=1,
        tid=1,
        flags=flags,
        begin_ns=0,
        end_ns=1,
        result=result,
        cgroup_id=0,
        netns=1,
        task_netns=1,
        mntns=1,
        sequence_begin=7,
        sequence_end=8 if moved else 7,
        answers=answers,
        error=error,
        parents=(),
        comm="",
        size=100,
        tail=b"",
        data=b"",
    )


#: Everything that can be seen of a batch, with every edge that the code knows.
EVERYTHING = [
    seen(moved=moved, flags=flags, error=error, result=result, answers=answers)
    for moved, flags, error, result, answers in product(
        (False, True), ANY_FLAGS, (0, -1), (-1, 0, 100), (0, ANSWERS_SEEN, ANSWERS_SEEN + 1)
    )
]


@pytest.mark.parametrize(
    ("result", "outcome"), [(0, Outcome.COMMITTED), (-22, Outcome.FAILED), (-1, Outcome.FAILED)]
)
def test_a_replacements_result_is_true(result: int, outcome: Outcome) -> None:
    """A setsockopt that returns 0 has replaced the table, any other has not."""
    assert replace_outcome(seen(kind=Kind.REPLACE4, result=result)) is outcome


def test_an_error_on_the_senders_socket_is_failure() -> None:
    """Whatever else was seen, an error among the answers or as the result means failed, and nothing else does."""
    for transaction, kind, exact in product(EVERYTHING, BatchKind, (False, True)):
        failed = transaction.error < 0 or transaction.result < 0
        assert (batch_outcome(transaction, kind, exact_sequence=exact) is Outcome.FAILED) == failed


def test_a_successful_result_does_not_hide_an_error() -> None:
    """The send of a batch that fails returns its length, as that of one which commits does."""
    assert batch_outcome(seen(error=-2), BatchKind.COMMITTABLE, exact_sequence=True) is Outcome.FAILED
    assert batch_outcome(seen(moved=True), BatchKind.COMMITTABLE, exact_sequence=True) is Outcome.COMMITTED


@pytest.mark.parametrize(
    ("kind", "outcome"), [(BatchKind.CHECKED, Outcome.CHECKED), (BatchKind.EMPTY, Outcome.EMPTY)]
)
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("moved", [True, False])
def test_a_batch_that_cannot_commit_did_not(
    kind: BatchKind, outcome: Outcome, exact: bool, moved: bool
) -> None:
    """A dry run and a batch without changes stay what they are, though another's commit moves the sequence meanwhile."""
    transaction = seen(moved=moved, flags=Flag.OVERLAP if moved else NONE)
    assert batch_outcome(transaction, kind, exact_sequence=exact) is outcome


@pytest.mark.parametrize("kind", [BatchKind.CHECKED, BatchKind.EMPTY])
def test_one_of_several_messages_is_not_judged_by_its_bytes(kind: BatchKind) -> None:
    """The copy is of the first message of a sendmmsg only: what committed may be in another."""
    assert batch_outcome(seen(flags=Flag.SEVERAL, moved=True), kind, exact_sequence=True) is Outcome.COMMITTED
    assert batch_outcome(seen(flags=Flag.SEVERAL), kind, exact_sequence=True) is Outcome.UNKNOWN


@pytest.mark.parametrize(
    ("kind", "moved", "overlap", "exact", "outcome"),
    [
        (BatchKind.COMMITTABLE, True, False, True, Outcome.COMMITTED),
        (BatchKind.COMMITTABLE, True, True, True, Outcome.COMMITTED),
        (BatchKind.COMMITTABLE, True, True, False, Outcome.COMMITTED),
        (BatchKind.COMMITTABLE, False, False, True, Outcome.EMPTY),
        (BatchKind.COMMITTABLE, False, True, True, Outcome.EMPTY),
        (BatchKind.COMMITTABLE, False, False, False, Outcome.EMPTY),
        # One bit, which two commits leave as it was: without an error, what can commit did.
        (BatchKind.COMMITTABLE, False, True, False, Outcome.COMMITTED),
        (BatchKind.UNKNOWN, True, False, True, Outcome.COMMITTED),
        (BatchKind.UNKNOWN, True, False, False, Outcome.COMMITTED),
        (BatchKind.UNKNOWN, True, True, True, Outcome.UNKNOWN),
        (BatchKind.UNKNOWN, False, False, True, Outcome.UNKNOWN),
        (BatchKind.UNKNOWN, False, True, False, Outcome.UNKNOWN),
    ],
)
def test_the_sequence_tells_the_rest(
    kind: BatchKind, moved: bool, overlap: bool, exact: bool, outcome: Outcome
) -> None:
    """A batch without an error committed if the sequence moved and it could have moved it; it was empty if not."""
    transaction = seen(moved=moved, flags=Flag.OVERLAP if overlap else NONE)
    assert batch_outcome(transaction, kind, exact_sequence=exact) is outcome


@pytest.mark.parametrize(
    ("answers", "outcome"), [(ANSWERS_SEEN, Outcome.EMPTY), (ANSWERS_SEEN + 1, Outcome.UNKNOWN)]
)
def test_answers_that_nobody_looked_at_leave_it_open(answers: int, outcome: Outcome) -> None:
    """Beyond the answers that the kernel side reads there may have been an error, unless the sequence moved."""
    assert batch_outcome(seen(answers=answers), BatchKind.COMMITTABLE, exact_sequence=True) is outcome
    moved = seen(answers=answers, moved=True)
    assert batch_outcome(moved, BatchKind.COMMITTABLE, exact_sequence=True) is Outcome.COMMITTED


def test_committed_is_never_guessed_from_an_exact_sequence() -> None:
    """Where the sequence is the generation, nothing has committed while it stayed the same."""
    for transaction, kind in product(EVERYTHING, BatchKind):
        outcome = batch_outcome(transaction, kind, exact_sequence=True)
        moved = transaction.sequence_begin != transaction.sequence_end
        assert outcome is not Outcome.COMMITTED or moved


def test_what_is_unknown_stays_unknown_unless_it_was_alone() -> None:
    """A batch whose end nobody saw is only called committed if nobody else can have moved the sequence."""
    for transaction, exact in product(EVERYTHING, (False, True)):
        outcome = batch_outcome(transaction, BatchKind.UNKNOWN, exact_sequence=exact)
        assert outcome in (Outcome.UNKNOWN, Outcome.FAILED, Outcome.COMMITTED)
        assert outcome is not Outcome.COMMITTED or not transaction.flags & Flag.OVERLAP
