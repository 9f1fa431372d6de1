# SPDX-License-Identifier: Apache-2.0
"""How a transaction ended, from what the kernel side saw. Pure.

A send's result is success for a failed batch too. What tells is, in this order: the error that the kernel queued on
the sender's own socket before the syscall returned (nobody else's, whatever runs at the same time); the batch's own
bytes (no BATCH_END is a check, no nf_tables message is empty); and whether the ruleset's sequence moved between entry
and exit.
"""

from kptrace.dataplanes.nftables.batch import BatchKind
from kptrace.model.rewrite import Outcome
from kptrace.signals.rewrite_records import Flag, Transaction

#: Answers that the kernel side looks through for an error: ANSWERS in bpf/include/kptrace/rewrite_socket.h.
ANSWERS_SEEN = 16


def replace_outcome(transaction: Transaction) -> Outcome:
    """A legacy table's replacement: its result is true."""
    return Outcome.COMMITTED if transaction.result == 0 else Outcome.FAILED


def batch_outcome(transaction: Transaction, kind: BatchKind, *, exact_sequence: bool) -> Outcome:
    """An nfnetlink batch.

    Args:
        transaction: what was seen.
        kind: what the copy says of the batch.
        exact_sequence: whether the sequence is the generation itself; otherwise it is one bit, which two commits leave
            as it was.
    """
    if transaction.error < 0 or transaction.result < 0:
        return Outcome.FAILED
    if transaction.flags & Flag.SEVERAL:
        kind = BatchKind.UNKNOWN  # the copy is of the first message only
    if kind is BatchKind.CHECKED:
        return Outcome.CHECKED
    if kind is BatchKind.EMPTY:
        return Outcome.EMPTY
    alone = not transaction.flags & Flag.OVERLAP
    known = kind is BatchKind.COMMITTABLE
    moved = transaction.sequence_begin != transaction.sequence_end
    if moved:
        return Outcome.COMMITTED if alone or known else Outcome.UNKNOWN
    if transaction.answers > ANSWERS_SEEN:
        return Outcome.UNKNOWN  # an error may have been among those that were not looked at
    if exact_sequence or alone:
        # No error and no commit: all it asked for was there already (an existing table added once more).
        return Outcome.EMPTY if known else Outcome.UNKNOWN
    return Outcome.COMMITTED if known else Outcome.UNKNOWN
