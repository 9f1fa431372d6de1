# SPDX-License-Identifier: Apache-2.0
"""The changes that no commit has carried yet, by Service port. No I/O; bounded."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from kptrace.dataplanes.told import EVERYTHING, Touched
from kptrace.model.identity import ServicePort
from kptrace.model.netfilter import IpFamily
from kptrace.signals.programming_events import Change, Commit, Subject

#: Changes that may be pending: ten times what a roll-out of a large Service brings.
MAX_PENDING: Final = 10_000


@dataclass(slots=True)
class Waiting:
    """A pending change, and the last commit that may have carried it, if the writer heard of it sooner than we did."""

    change: Change
    perhaps: Commit | None = None


@dataclass(slots=True)
class Group:
    """The pending changes of one Service port in one family, and whether it has no endpoint for this node now."""

    bare: bool
    waiting: dict[Subject, Waiting] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Ages:
    """How many changes are pending in one family, and when the oldest of them arrived; 0 where there is none."""

    count: int = 0
    oldest_ns: int = 0


class Pending:
    """All of them."""

    def __init__(self, limit: int = MAX_PENDING) -> None:
        """At most `limit`."""
        self._limit = limit
        self._groups: dict[tuple[IpFamily, ServicePort], Group] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def full(self) -> bool:
        """Whether there is no room for another one."""
        return self._count >= self._limit

    def get(self, subject: Subject) -> Waiting | None:
        """The pending change of a subject."""
        group = self._groups.get((subject.family, subject.port))
        return group.waiting.get(subject) if group else None

    def add(self, waiting: Waiting) -> None:
        """One more; its subject has none."""
        change = waiting.change
        group = self._groups.setdefault((change.family, change.port), Group(change.bare))
        group.waiting[change.subject] = waiting
        self._count += 1

    def tell_bare(self, change: Change) -> None:
        """A newer change of the same Service port says whether it has endpoints."""
        group = self._groups.get((change.family, change.port))
        if group is not None:
            group.bare = change.bare

    def remove(self, subject: Subject) -> Waiting | None:
        """Take a subject's change out."""
        key = subject.family, subject.port
        group = self._groups.get(key)
        found = group.waiting.pop(subject, None) if group else None
        if group is not None and found is not None:
            self._count -= 1
            if not group.waiting:
                del self._groups[key]
        return found

    def of_port(self, family: IpFamily, port: ServicePort) -> list[Waiting]:
        """Those of one Service port."""
        group = self._groups.get((family, port))
        return list(group.waiting.values()) if group else []

    def of_family(self, family: IpFamily) -> list[tuple[Group, Waiting]]:
        """Those of one family."""
        return [
            (group, waiting)
            for (each, _), group in self._groups.items()
            if each is family
            for waiting in group.waiting.values()
        ]

    def of_ports(self, family: IpFamily, ports: Touched) -> list[tuple[Group, Waiting]]:
        """Those of these Service ports in one family."""
        if ports is EVERYTHING:
            return self.of_family(family)
        groups = [group for port in ports if (group := self._groups.get((family, port)))]
        return [(group, waiting) for group in groups for waiting in group.waiting.values()]

    def every(self) -> Iterator[Waiting]:
        """All of them, as they are now."""
        return iter([waiting for group in self._groups.values() for waiting in group.waiting.values()])

    def ages(self) -> Mapping[IpFamily, Ages]:
        """Number and oldest by family, also where there are none."""
        return {family: _ages(waiting for _, waiting in self.of_family(family)) for family in IpFamily}


def _ages(waiting: Iterable[Waiting]) -> Ages:
    times = [each.change.received_ns for each in waiting]
    return Ages(len(times), min(times, default=0))
