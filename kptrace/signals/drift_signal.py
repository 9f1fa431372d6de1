# SPDX-License-Identifier: Apache-2.0
"""The drift signal: compares what kube-proxy's rules lead to with what the API wants, as often as they are read back.

Comparing needs the names, which belong to the loop's thread, and goes in slices.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Final, Protocol

from kptrace.dataplanes.installed_services import Installed
from kptrace.identity.eligible import Wanted
from kptrace.kernel.netns import NetworkNamespace
from kptrace.model.identity import ServicePort
from kptrace.model.metrics import MetricFamily, MetricSpec, Sample
from kptrace.model.netfilter import IpFamily
from kptrace.model.signal import MechanismState, State
from kptrace.signals.drift import Drift, DriftTracker, differences, summary
from kptrace.signals.drift_reader import DriftReader

SPEC: Final = MetricSpec(
    "kptrace_service_drift",
    "gauge",
    "Service ports whose installed endpoints differ from those that the API wants on this node, for longer than"
    " --drift-after. Read back from kube-proxy's rules by netlink; in iptables-nft only what is missing can be seen.",
    ("dataplane", "family"),
)
READINGS: Final = MetricSpec(
    "kptrace_service_drift_readings_total",
    "counter",
    "Readings of kube-proxy's rules that were compared with the API, by result.",
    ("result",),
)
#: How long a difference must last, and how many readings there are in that time at most.
AFTER_SECONDS: Final = 60.0
READINGS_WITHIN: Final = 2
#: Services compared at a time, and the pause between.
SLICE: Final = 64
PAUSE_SECONDS: Final = 0.01

Name = tuple[str, str]


class Names(Protocol):
    """What the identity knows of Services that kube-proxy is to program here; for the loop's thread."""

    @property
    def followed(self) -> bool:
        """Whether all of it was listed."""
        ...

    def programmed(self) -> Sequence[Name]:
        """The Services."""
        ...

    def wanted(self, name: Name) -> Mapping[tuple[ServicePort, IpFamily], Wanted]:
        """What one of them is to have."""
        ...


class Loop(Protocol):
    """The part of the daemon's loop that is needed."""

    def call_later(self, seconds: float, callback: Callable[[], None]) -> object:
        """Call once."""
        ...

    def call_soon_threadsafe(self, callback: Callable[[], None]) -> None:
        """Call from the loop's thread."""
        ...


class DriftSignal:
    """Implements `kptrace.model.signal.Source`."""

    name = "drift"

    def __init__(
        self,
        netns: NetworkNamespace,
        names: Names,
        loop: Loop,
        *,
        after_seconds: float = AFTER_SECONDS,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """Nothing is read before `start`.

        Args:
            netns: where kube-proxy's rules are.
            names: what is to be in them.
            loop: the daemon's.
            after_seconds: how long a difference must last.
            clock: CLOCK_MONOTONIC, ns.
        """
        self._names = names
        self._loop = loop
        self._clock = clock
        self._reader = DriftReader(netns, self._deliver, after_seconds / READINGS_WITHIN, clock)
        self._trackers = {family: DriftTracker(family, round(after_seconds * 1e9)) for family in IpFamily}
        self._drifts: Mapping[IpFamily, tuple[Drift, ...]] = MappingProxyType({})
        self._planes: Mapping[IpFamily, str] = MappingProxyType({})
        self._readings = {"compared": 0, "nothing_installed": 0, "failed": 0}

    def start(self) -> None:
        """Read now, and again for as long as the daemon lives."""
        self._reader.start()

    def close(self) -> None:
        """Read no more. Idempotent."""
        self._reader.close()

    def _deliver(self, installed: Sequence[Installed], begin_ns: int) -> None:
        self._loop.call_soon_threadsafe(lambda: self._compare(installed, begin_ns))

    def _compare(self, installed: Sequence[Installed], begin_ns: int) -> None:
        if not self._names.followed or not installed:
            self._readings["nothing_installed"] += not installed
            self._planes = MappingProxyType({})
            self._drifts = MappingProxyType({})
            self._reader.go_on()
            return
        by_family = {each.family: each for each in installed}
        names = deque(self._names.programmed())

        def go_on() -> None:
            try:
                for _ in range(min(SLICE, len(names))):
                    self._note(names.popleft(), by_family, begin_ns)
            except Exception:
                self._abandon()
                raise
            if names:
                self._loop.call_later(PAUSE_SECONDS, go_on)
            else:
                self._finish(by_family)

        go_on()

    def _note(self, name: Name, by_family: Mapping[IpFamily, Installed], begin_ns: int) -> None:
        for (port, family), wanted in self._names.wanted(name).items():
            if family in by_family:
                found = differences(port, wanted.endpoints, by_family[family])
                self._trackers[family].note(port, found, begin_ns)

    def _abandon(self) -> None:
        """The comparison failed, which the loop logs and counts: the next reading is another chance."""
        for tracker in self._trackers.values():
            tracker.abandon()
        self._readings["failed"] += 1
        self._reader.go_on()

    def _finish(self, by_family: Mapping[IpFamily, Installed]) -> None:
        now, drifts = self._clock(), {}
        for family, tracker in self._trackers.items():
            if family in by_family:
                tracker.finish()
                drifts[family] = tuple(tracker.drifting(now, by_family[family].dataplane))
        self._drifts = MappingProxyType(drifts)
        self._planes = MappingProxyType({family: each.dataplane.value for family, each in by_family.items()})
        self._readings["compared"] += 1
        self._reader.go_on()

    def losses(self) -> Mapping[tuple[str, str], int]:
        """None: what was not read is read again."""
        return {}

    def status(self, *, names: bool) -> Mapping[str, object]:
        """What /status shows of it."""
        drifts = self._drifts
        section: dict[str, object] = {
            "drifting": sum(map(len, drifts.values())),
            "readings": self._readings["compared"],
        }
        return {"drift": section, **({"drifting": summary(drifts)} if names else {})}

    def explain(self, namespace: str, name: str) -> Mapping[str, object]:
        """What is known of one Service."""
        mine = {
            family: tuple(
                each for each in every if (each.port.namespace, each.port.name) == (namespace, name)
            )
            for family, every in self._drifts.items()
        }
        return {"drift": summary(mine)}

    def describe(self) -> Sequence[MetricSpec]:
        """See `Source`."""
        return SPEC, READINGS

    def families(self) -> Iterable[MetricFamily]:
        """See `Source`."""
        drifts, planes = self._drifts, self._planes
        found = [
            Sample((plane, family.value), float(len(drifts.get(family, ()))))
            for family, plane in planes.items()
        ]
        counts = {**self._readings, "interrupted": self._reader.interrupted}
        readings = [Sample((result,), float(count)) for result, count in counts.items()]
        return MetricFamily(SPEC, found), MetricFamily(READINGS, readings)

    def states(self) -> Sequence[MechanismState]:
        """See `Source`."""
        if trouble := self._reader.trouble:
            return [MechanismState(self.name, "netlink", State.DEGRADED, "not_read", trouble)]
        if not self._names.followed:
            detail = "Services, EndpointSlices and this node are not all listed yet"
            return [MechanismState(self.name, "netlink", State.DEGRADED, "starting", detail)]
        if not self._planes:
            detail = "nf_tables has no rules of kube-proxy's here; those of iptables-legacy are not read back"
            return [MechanismState(self.name, "netlink", State.DEGRADED, "nothing_installed", detail)]
        return [MechanismState(self.name, "netlink", State.ACTIVE)]
