# SPDX-License-Identifier: Apache-2.0
"""Service ports whose installed endpoints are not those that the API wants there, and stay so. Pure.

One reading proves nothing: it takes a while, and the API goes on meanwhile. A difference counts once the same one was found
by every reading for a time.
"""

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Final

from kptrace.dataplanes.installed_services import Address, Installed
from kptrace.model.identity import ServicePort
from kptrace.model.netfilter import DataPlane, IpFamily

#: Service ports of one family that are remembered with a difference, and differences of each.
MAX_PORTS: Final = 10_000
MAX_DIFFERENCES: Final = 100
NOT_INSTALLED: Final = "no rules"


@dataclass(frozen=True, slots=True)
class Drift:
    """One Service port that drifts.

    Attributes:
        port, family: which.
        dataplane: in whose rules.
        since_ns: when the oldest of its differences was found first, CLOCK_MONOTONIC.
        differences: `lacks 10.0.0.1:80`, `has 10.0.0.2:80 besides`, or `no rules`.
    """

    port: ServicePort
    family: IpFamily
    dataplane: DataPlane
    since_ns: int
    differences: tuple[str, ...]


def differences(port: ServicePort, endpoints: Set[Address], installed: Installed) -> frozenset[str]:
    """How the rules of a Service port differ from the endpoints that it should have on this node."""
    present = installed.present(port)
    if present is None or (not present and not endpoints):
        return frozenset()
    if not present:
        return frozenset({NOT_INSTALLED})
    lacking = (f"lacks {_text(each)}" for each in installed.lacking(port, endpoints))
    besides = (f"has {_text(each)} besides" for each in installed.besides(port, endpoints))
    return frozenset(sorted([*lacking, *besides])[:MAX_DIFFERENCES])


class DriftTracker:
    """Remembers differences of one family from reading to reading."""

    def __init__(self, family: IpFamily, threshold_ns: int) -> None:
        """Nothing differs; what differs for `threshold_ns` drifts."""
        self._family = family
        self._threshold_ns = threshold_ns
        self._since: dict[ServicePort, dict[str, int]] = {}
        self._next: dict[ServicePort, dict[str, int]] = {}

    def note(self, port: ServicePort, found: Set[str], at_ns: int) -> None:
        """What a reading that began at `at_ns` found of a Service port."""
        if not found or (len(self._next) >= MAX_PORTS and port not in self._next):
            return
        known = self._since.get(port, {})
        self._next[port] = {each: known.get(each, at_ns) for each in found}

    def finish(self) -> None:
        """The reading is over: what it did not find is none any more."""
        self._since, self._next = self._next, {}

    def abandon(self) -> None:
        """The reading came to nothing: all stays as it was."""
        self._next = {}

    def drifting(self, now_ns: int, dataplane: DataPlane) -> Iterator[Drift]:
        """Those whose differences lasted long enough."""
        for port, since in self._since.items():
            lasting = {each: at for each, at in since.items() if now_ns - at >= self._threshold_ns}
            if lasting:
                yield Drift(port, self._family, dataplane, min(lasting.values()), tuple(sorted(lasting)))


def summary(drifts: Mapping[IpFamily, tuple[Drift, ...]]) -> list[dict[str, object]]:
    """What /status shows of them, with names."""
    return [
        {
            "service": f"{each.port.namespace}/{each.port.name}:{each.port.port}/{each.port.protocol.name.lower()}",
            "family": family.value,
            "dataplane": each.dataplane.value,
            "differences": list(each.differences),
        }
        for family, every in drifts.items()
        for each in every
    ]


def _text(address: Address) -> str:
    ip, number = address
    return f"[{ip}]:{number}" if ":" in ip else f"{ip}:{number}"
