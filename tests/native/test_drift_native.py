# SPDX-License-Identifier: Apache-2.0
"""The drift signal's thread beside real rules and the daemon's own loop: it ends when asked, and outlives a failure."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import pytest

from kptrace.daemon.loop import Loop
from kptrace.experiments.node import EmbeddedNode
from kptrace.experiments.services import ServiceSpec, make_services
from kptrace.experiments.writer import RuleWriter
from kptrace.identity.eligible import Wanted
from kptrace.kernel.netns import NetworkNamespace
from kptrace.model.identity import ServicePort
from kptrace.model.metrics import Sample
from kptrace.model.netfilter import DataPlane, IpFamily
from kptrace.signals.drift_signal import DriftSignal

SERVICES = 97
AFTER_SECONDS = 0.4


class Names:
    """What the API wants: the specs as they are, until one is changed or asking fails."""

    followed = True

    def __init__(self, specs: Sequence[ServiceSpec]) -> None:
        self.specs = {(spec.port.namespace, spec.port.name): spec for spec in specs}
        self.more: frozenset[tuple[str, int]] = frozenset()
        self.failing = False

    def programmed(self) -> list[tuple[str, str]]:
        """All of them."""
        return list(self.specs)

    def wanted(self, name: tuple[str, str]) -> Mapping[tuple[ServicePort, IpFamily], Wanted]:
        """Its endpoints, and `more` of the first Service."""
        if self.failing:
            raise RuntimeError("asked in vain")
        spec = self.specs[name]
        ends = frozenset((end.ip, end.port) for end in spec.endpoints)
        first = name == next(iter(self.specs))
        return {(spec.port, spec.family): Wanted(frozenset(), ends | (self.more if first else frozenset()))}


@pytest.fixture
def specs() -> Sequence[ServiceSpec]:
    """More Services than fit in one slice of the comparison."""
    return make_services(SERVICES, 3)


@pytest.fixture
def node(specs: Sequence[ServiceSpec]) -> Iterator[EmbeddedNode]:
    """A node whose rules have them."""
    with EmbeddedNode() as made:
        RuleWriter(made.node, DataPlane.NFTABLES).install(specs)
        yield made


def until(loop: Loop, condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Run the loop until a condition is true."""
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, "it never came"
        loop.run_once(0.01)


def values(signal: DriftSignal) -> dict[str, float]:
    """What is exposed: drift, and readings by result."""
    found = {}
    for family in signal.families():
        for sample in family.samples:
            assert isinstance(sample, Sample)
            found[sample.labels[0]] = sample.value
    return found


def test_what_lasts_is_counted_and_a_failure_is_outlived(
    node: EmbeddedNode, specs: Sequence[ServiceSpec]
) -> None:
    """No drift, then one Service that lacks an endpoint, through a comparison that fails, and none again."""
    names, loop, netns = Names(specs), Loop(), NetworkNamespace(node.node.path)
    signal = DriftSignal(netns, names, loop, after_seconds=AFTER_SECONDS)
    signal.start()
    try:
        until(loop, lambda: values(signal)["compared"] >= 2)
        assert values(signal)["nftables"] == 0
        names.more = frozenset({("10.99.0.1", 8080)})
        until(loop, lambda: values(signal)["nftables"] == 1)
        names.failing = True
        until(loop, lambda: values(signal)["failed"] >= 1)
        assert loop.failures >= 1
        names.failing = False
        compared = values(signal)["compared"]
        until(loop, lambda: values(signal)["compared"] > compared)
        assert values(signal)["nftables"] == 1
        (row,) = signal.status(names=True)["drifting"]  # type: ignore[misc]
        assert row["differences"] == ["lacks 10.99.0.1:8080"]
        names.more = frozenset()
        until(loop, lambda: values(signal)["nftables"] == 0)
    finally:
        signal.close()
        netns.close()
        loop.close()


@pytest.mark.parametrize("delay", [0.0, 0.002, 0.01, 0.03, 0.1])
def test_it_ends_though_nobody_compares(
    node: EmbeddedNode, specs: Sequence[ServiceSpec], delay: float
) -> None:
    """Closed in the middle of a reading, or while its result waits for a loop that has stopped, it ends at once."""
    loop, netns = Loop(), NetworkNamespace(node.node.path)
    signal = DriftSignal(netns, Names(specs), loop, after_seconds=AFTER_SECONDS)
    signal.start()
    time.sleep(delay)  # where in a reading it is closed: there is no condition to wait for
    closing = threading.Thread(target=signal.close, daemon=True)
    closing.start()
    closing.join(5.0)
    assert not closing.is_alive()
    netns.close()
    loop.close()


def test_a_namespace_that_cannot_be_entered_is_said(node: EmbeddedNode, specs: Sequence[ServiceSpec]) -> None:
    """The state is degraded with what was seen, and the thread goes on."""
    loop, netns = Loop(), NetworkNamespace(node.node.path)
    netns.close()
    signal = DriftSignal(netns, Names(specs), loop, after_seconds=AFTER_SECONDS)
    signal.start()
    try:
        until(loop, lambda: values(signal)["interrupted"] >= 2)
        (state,) = signal.states()
        assert (state.state, state.reason) == ("degraded", "not_read")
    finally:
        signal.close()
        loop.close()
