# SPDX-License-Identifier: Apache-2.0
"""Whether a commit carries a change: by its bytes where they tell, else by time. Pure."""

from enum import Enum, auto
from typing import NamedTuple

from kptrace.signals.programming_events import Attribution, Change, Commit


class Verdict(Enum):
    """What a commit has to do with a change.

    CARRIES: the change is true after it. LACKS: it wrote the Service port without the change. UNTOUCHED: it did not write
    the Service port. PERHAPS: it did, or may have, but its run began before the event arrived here: the writer may have
    heard of it a little sooner than we did.
    """

    CARRIES = auto()
    LACKS = auto()
    UNTOUCHED = auto()
    PERHAPS = auto()


class Judgement(NamedTuple):
    """A verdict and what it rests on."""

    verdict: Verdict
    attribution: Attribution


def judge(change: Change, commit: Commit, *, bare: bool) -> Judgement:
    """Whether a commit carries a change of its family.

    Args:
        change: the change.
        commit: the commit.
        bare: whether the Service port has no endpoint for this node now.
    """
    touches = commit.told.touches(change.port, bare=bare)
    # A Service port that goes may leave nothing but the keys of its addresses.
    if touches is False and change.kind.of_endpoint:
        return Judgement(Verdict.UNTOUCHED, Attribution.EXACT)
    shown = _shown(change, commit)
    if shown is not None:
        verdict = Verdict.CARRIES if shown is change.kind.added else Verdict.LACKS
        return Judgement(verdict, Attribution.EXACT)
    if touches is False:
        return Judgement(Verdict.UNTOUCHED, Attribution.EXACT)
    by_name = Attribution.EXACT if touches else Attribution.INFERRED
    if change.received_ns <= commit.run_begin_ns:
        return Judgement(Verdict.CARRIES, by_name)
    return Judgement(Verdict.PERHAPS, Attribution.INFERRED)


def _shown(change: Change, commit: Commit) -> bool | None:
    """Whether the change's subject is there after the commit, where its bytes show it."""
    if change.kind.of_endpoint:
        told = commit.told.endpoint(change.port, change.ip, change.number)
        if told is not None or not change.kind.added or commit.end_ns < change.received_ns:
            return told
        # Of an endpoint that was not there nothing has to be deleted; in a commit before, it may have been.
        return True if commit.told.mentions(change.port, change.ip, change.number) else None
    if not change.whole:
        return commit.told.address(change.port, change.ip, change.number)
    answers = [commit.told.address(change.port, ip, number) for ip, number in change.addresses]
    # One address is enough: those of a Service port come and go together.
    for answer in (change.kind.added, not change.kind.added):
        if answer in answers:
            return answer
    return commit.told.present(change.port)
