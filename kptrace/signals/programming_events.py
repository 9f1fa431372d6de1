# SPDX-License-Identifier: Apache-2.0
"""What goes into the programming signal's correlator, and what comes out: plain data. Pure.

Times are ns of CLOCK_MONOTONIC but for the trigger's, which is another machine's clock.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from kptrace.dataplanes.told import EVERYTHING, Told, Touched
from kptrace.model.identity import ServicePort
from kptrace.model.netfilter import DataPlane, IpFamily
from kptrace.model.rewrite import Outcome


class ChangeKind(StrEnum):
    """What changed, as a label value. An address of a Service port that comes or goes alone is a service change."""

    ENDPOINT_ADDED = "endpoint_added"
    ENDPOINT_REMOVED = "endpoint_removed"
    SERVICE_ADDED = "service_added"
    SERVICE_REMOVED = "service_removed"

    @property
    def added(self) -> bool:
        """Whether something is to be there."""
        return self in (ChangeKind.ENDPOINT_ADDED, ChangeKind.SERVICE_ADDED)

    @property
    def of_endpoint(self) -> bool:
        """Whether it is about an endpoint."""
        return self in (ChangeKind.ENDPOINT_ADDED, ChangeKind.ENDPOINT_REMOVED)


class Subject(NamedTuple):
    """What can be there or not: an endpoint, an address, or (without either) a Service port itself."""

    port: ServicePort
    family: IpFamily
    of_endpoint: bool
    ip: str
    number: int


@dataclass(frozen=True, slots=True)
class Change:
    """One thing that kube-proxy is to make true.

    Attributes:
        kind: what.
        port, family: of what.
        received_ns: when the bytes of the watch event arrived.
        ip, number: the endpoint or address; without an IP a node port; without both the Service port, all at once.
        bare: whether the Service port has no endpoint for this node, in this family, after the change.
        addresses: of a Service port that comes or goes: where it is or was reached.
        trigger_ns: the annotation's time in ns since the epoch, 0 for none.
    """

    kind: ChangeKind
    port: ServicePort
    family: IpFamily
    received_ns: int
    ip: str = ""
    number: int = 0
    bare: bool = False
    addresses: tuple[tuple[str, int], ...] = ()
    trigger_ns: int = 0

    @property
    def subject(self) -> Subject:
        """What it is about; a later change of the same subject undoes it, or says it again."""
        return Subject(self.port, self.family, self.kind.of_endpoint, self.ip, self.number)

    @property
    def whole(self) -> bool:
        """Whether it is a Service port that comes or goes."""
        return not self.kind.of_endpoint and not self.ip and not self.number


@dataclass(frozen=True, slots=True)
class Commit:
    """A transaction that may carry changes, or a run of its writer that ended without one.

    Attributes:
        dataplane, family: where.
        writer: the class of the process.
        outcome: how it ended.
        begin_ns, end_ns: the system call's entry and return.
        run_begin_ns: when its writer's run began: what the writer heard before that is in it; `begin_ns` if unknown.
        told: what its own bytes tell.
        only: the Service ports that it can have touched; others need not be asked about.
    """

    dataplane: DataPlane
    family: IpFamily
    writer: str
    outcome: Outcome
    begin_ns: int
    end_ns: int
    run_begin_ns: int
    told: Told
    only: Touched = EVERYTHING


class Fate(StrEnum):
    """What became of a change: each has one, or is pending.

    PROGRAMMED: a commit carried it. EARLY: the commit ended before the event arrived. SUPERSEDED: it was undone, or gone
    with its Service port, before a commit. UNMEASURED: nobody can say, for a reason.
    """

    PROGRAMMED = "programmed"
    EARLY = "early"
    SUPERSEDED = "superseded"
    UNMEASURED = "unmeasured"


class Reason(StrEnum):
    """Why a change is not measured.

    OVERFLOW: too many were pending. RELISTED: a list told of it, or a watch that had been broken: late. EVENTS_LOST: its
    commit may have been missed. UNKNOWN_OUTCOME: it may have been in a transaction of which nobody can say how it ended.
    NOT_PROGRAMMED: runs that began long after it did not write it. RESET: the watch was given up.
    """

    OVERFLOW = "overflow"
    RELISTED = "relisted"
    EVENTS_LOST = "events_lost"
    UNKNOWN_OUTCOME = "unknown_outcome"
    NOT_PROGRAMMED = "not_programmed"
    RESET = "reset"


class Attribution(StrEnum):
    """How a change's commit was found.

    EXACT: the transaction's own bytes name it. INFERRED: by time, from the beginning of the writer's run.
    """

    EXACT = "exact"
    INFERRED = "inferred"


@dataclass(frozen=True, slots=True)
class Result:
    """The fate of one change.

    Attributes:
        change, fate: which and what.
        commit: that carried it; of PROGRAMMED and EARLY only.
        attribution: how the commit was found; of these only.
        reason: of UNMEASURED only.
    """

    change: Change
    fate: Fate
    commit: Commit | None = None
    attribution: Attribution | None = None
    reason: Reason | None = None

    @property
    def duration_ns(self) -> int:
        """From the event to the commit; below 0 if it was early, 0 without a commit."""
        return self.commit.end_ns - self.change.received_ns if self.commit else 0
