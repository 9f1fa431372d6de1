# SPDX-License-Identifier: Apache-2.0
"""What files and watches say to the owner of the store, and what the owner needs of either."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from kptrace.identity.records import Kind, Record
from kptrace.identity.store import Event


@dataclass(frozen=True, slots=True)
class Listed:
    """All objects of one kind; the marker that this part of the first synchronisation is done.

    Attributes:
        scope: which part of the feed speaks: `file`, or one watch (`watch_services`).
        at: when it arrived, monotonic seconds. So in all messages.
        kind: of the records.
        records: every object that there is.
    """

    scope: str
    at: float
    kind: Kind
    records: tuple[Record, ...]


@dataclass(frozen=True, slots=True)
class Changed:
    """Objects that came, changed or went, in this order; `at` is when the bytes of the last of them arrived."""

    scope: str
    at: float
    events: tuple[Event, ...]


@dataclass(frozen=True, slots=True)
class Alive:
    """The source answered, and nothing changed."""

    scope: str
    at: float


@dataclass(frozen=True, slots=True)
class Trouble:
    """The source cannot be heard or understood now; the names known so far stay.

    Attributes:
        scope, at: as in `Listed`.
        reason: short stable code, one of the feed's `reasons`.
        detail: for everyone (/status): what was seen, without names of services and pods.
        message: for logs and errors: the same with names, where that is more.
    """

    scope: str
    at: float
    reason: str
    detail: str
    message: str = ""


@dataclass(frozen=True, slots=True)
class Rejected:
    """One object that could not be decoded; what was known of it stays."""

    scope: str
    at: float
    detail: str


Message = Listed | Changed | Alive | Trouble | Rejected

#: The reason code of `Rejected` in the error counter.
REJECTED = "malformed_object"


class Feed(Protocol):
    """Where Kubernetes objects come from. All methods are for the owner's thread, and none but `start` blocks."""

    @property
    def source(self) -> str:
        """Label value of the error counter: `file` or `api`."""
        ...

    @property
    def scopes(self) -> Sequence[str]:
        """The parts that each have a state of their own."""
        ...

    @property
    def reasons(self) -> Sequence[str]:
        """All reason codes that it can ever give."""
        ...

    def start(self) -> None:
        """Begin. A feed that needs nothing from the network reads its first objects here.

        Raises:
            ManifestError: the objects cannot be read or understood.
        """
        ...

    def drain(self) -> Sequence[Message]:
        """What arrived since the last call, a bounded number of messages."""
        ...

    def close(self) -> None:
        """End threads and connections. Idempotent."""
        ...
