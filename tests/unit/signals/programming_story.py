# SPDX-License-Identifier: Apache-2.0
"""What tests of the programming signal are told in: changes and commits in a few words, times in milliseconds."""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from kptrace.dataplanes.nftables.services import ServiceBatch
from kptrace.dataplanes.told import EVERYTHING, NOTHING_TOLD, Names, Told, Touched
from kptrace.model.identity import Protocol, ServicePort
from kptrace.model.netfilter import DataPlane, IpFamily
from kptrace.model.rewrite import Outcome
from kptrace.signals.programming_correlate import Correlator
from kptrace.signals.programming_events import Change, ChangeKind, Commit, Result

MS = 1_000_000
V4, V6 = IpFamily.IPV4, IpFamily.IPV6
WEB = ServicePort("demo", "web", "http", Protocol.TCP)
API = ServicePort("demo", "api", "https", Protocol.TCP)
ADDED, REMOVED = ChangeKind.ENDPOINT_ADDED, ChangeKind.ENDPOINT_REMOVED
CREATED, DELETED = ChangeKind.SERVICE_ADDED, ChangeKind.SERVICE_REMOVED


def base(port: ServicePort) -> str:
    """A Service port's name in nftables chains."""
    return f"{port.namespace}/{port.name}/{port.protocol.name.lower()}/{port.port}"


def holds(
    port: ServicePort = WEB, *endpoints: str, full: bool = False, truncated: bool = False
) -> ServiceBatch:
    """A batch that writes one Service port with these endpoints, all at port 80."""
    return ServiceBatch(
        V4,
        truncated,
        full,
        {base(port): {"service"}},
        {base(port): {(ip, 80) for ip in endpoints}},
    )


def names(*ports: ServicePort) -> Names:
    """A batch that touches Service ports and tells no more."""
    return Names(frozenset(ports))


def change(
    at: float, kind: ChangeKind = ADDED, ip: str = "10.0.0.1", port: ServicePort = WEB, **more: Any
) -> Change:
    """A change that arrived at `at` ms; of a Service port as a whole unless it is about an endpoint."""
    number = 80 if kind.of_endpoint else 0
    return Change(kind, port, more.pop("family", V4), int(at * MS), ip if number else "", number, **more)


def commit(
    run: float,
    end: float,
    told: Told | Touched = EVERYTHING,
    *,
    outcome: Outcome = Outcome.COMMITTED,
    writer: str = "kube-proxy",
    family: IpFamily = V4,
) -> Commit:
    """A transaction that ended at `end` ms, of a run that began at `run` ms."""
    if told is EVERYTHING:
        plane, said = DataPlane.IPTABLES_LEGACY, NOTHING_TOLD
    else:
        plane, said = DataPlane.NFTABLES, Names(told) if isinstance(told, frozenset) else told
    end_ns = int(end * MS)
    return Commit(plane, family, writer, outcome, end_ns - MS // 10, end_ns, int(run * MS), said)


@dataclass
class Watch:
    """A correlator and what came out of it."""

    limit: int = 1000
    writers: Collection[str] = ("kube-proxy",)
    results: list[Result] = field(default_factory=list)
    changes: int = 0

    def __post_init__(self) -> None:
        """Make the correlator."""
        self.correlator = Correlator(self.results.append, writers=self.writers, limit=self.limit)

    def tell(self, *what: Change | Commit) -> list[str]:
        """Tell these in order; the fates that came of them."""
        before = len(self.results)
        for each in what:
            if isinstance(each, Change):
                self.changes += self.correlator.change(each)
            else:
                self.correlator.commit(each)
        return self.fates(before)

    def tick(self, now: float, running: float | None = None) -> list[str]:
        """Let it be `now` ms."""
        before = len(self.results)
        self.correlator.tick(int(now * MS), None if running is None else int(running * MS))
        return self.fates(before)

    def fates(self, start: int = 0) -> list[str]:
        """Results in words: fate, milliseconds or reason, attribution."""
        return [_words(result) for result in self.results[start:]]

    def balanced(self) -> bool:
        """Whether every change is pending or has one fate."""
        return self.changes == len(self.results) + len(self.correlator)


def _words(result: Result) -> str:
    if result.commit is None:
        return f"{result.fate} {result.reason}" if result.reason else str(result.fate)
    return f"{result.fate} {result.duration_ns / MS:g} {result.attribution}"
