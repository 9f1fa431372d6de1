# SPDX-License-Identifier: Apache-2.0
"""The lookup signal by hook brackets: follows the chains, governs its cost, and reports what it measured."""

import time
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import structlog

from kptrace.kernel.netns import NetworkNamespace
from kptrace.model.errors import KernelError
from kptrace.model.identity import Snapshot
from kptrace.model.metrics import MetricFamily, MetricSpec
from kptrace.model.signal import MechanismState
from kptrace.signals.lookup_families import SPECS, Published, bracket_families, own_families, status_rows
from kptrace.signals.lookup_floor import measure_floor
from kptrace.signals.lookup_follow import BracketFollower, Chains
from kptrace.signals.lookup_govern import Costs, OverheadGovernor
from kptrace.signals.lookup_kernel import LookupKernel
from kptrace.signals.lookup_plan import Boundary
from kptrace.signals.lookup_services import (
    CELL_BYTES,
    NAMED_SERIES,
    PLANES,
    SERVICE_SPEC,
    ServiceNumbers,
    ServiceTop,
    service_rows,
)
from kptrace.signals.sampling import Sampling

#: What `make bench` measured on the reference machine, beyond what two programs that do nothing cost (docs/overhead.md).
COSTS = Costs(sampled=160.0, unsampled=40.0)
TICK_SECONDS = 0.5
GOVERN_SECONDS = 1.0
TOP_SECONDS = 10.0


class Timers(Protocol):
    """The part of the daemon's loop that the signal needs."""

    def call_every(self, seconds: float, callback: Callable[[], None]) -> object:
        """Call again and again."""
        ...

    def call_soon_threadsafe(self, callback: Callable[[], None]) -> None:
        """Call from the loop's thread."""
        ...


@dataclass(frozen=True, slots=True)
class Options:
    """What a user can set of this signal; see `kptrace.daemon.settings`."""

    sampling: Sampling = Sampling()
    budget: float = 0.0
    with_nfqueue: bool = False
    named_services: int = NAMED_SERIES


class LookupSignal:
    """Implements `kptrace.model.signal.Source`."""

    name = "lookup"

    def __init__(
        self,
        kernel: LookupKernel,
        netns: NetworkNamespace,
        chains: Chains,
        timers: Timers,
        options: Options,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Nothing is attached before `start`."""
        self._kernel = kernel
        self._timers = timers
        self._options = options
        self._clock = clock
        self._log = structlog.get_logger(signal=self.name)
        self._follower = BracketFollower(kernel, netns, chains, with_nfqueue=options.with_nfqueue)
        self._services = ServiceNumbers()
        self._top = ServiceTop(options.named_services)
        self._governor = OverheadGovernor(options.sampling, options.budget, COSTS, clock)
        self._floor: float | None = None
        self._closed = False
        self._published = Published(self._follower.state)

    @property
    def boundaries(self) -> tuple[Boundary, ...]:
        """What is linked now."""
        return self._follower.boundaries

    def start(self) -> None:
        """Attach, arm, measure the floor, and keep up with changes from then on."""
        self._kernel.attach_drops()
        self.tick()
        self._arm()
        try:
            self._floor = measure_floor(self._kernel)
        except KernelError as error:
            self._log.warning("floor_not_measured", error=str(error))
        self._publish()
        self._timers.call_every(TICK_SECONDS, self.tick)
        self._timers.call_every(GOVERN_SECONDS, self._govern)
        self._timers.call_every(TOP_SECONDS, self._choose_services)

    def notice_rewrite(self) -> None:
        """Base chains may have changed: look at once instead of at the next tick."""
        self._follower.look_again()
        self.tick()

    def set_identity(self, snapshot: Snapshot) -> None:
        """Count first packets to these Service addresses from now on."""
        if not self._closed:
            self._kernel.set_services(self._services.entries(snapshot.services))

    def tick(self) -> None:
        """Follow what changed in the namespace."""
        if not self._closed:
            self._follower.tick(attached=self._governor.attached)
            self._publish()

    def _arm(self) -> None:
        self._kernel.configure(armed=True, sampling=self._governor.sampling())

    def _govern(self) -> None:
        if self._closed:
            return
        changed = self._governor.govern(self._kernel.opened(), self._log)
        if changed.sampling:
            self._arm()
        if changed.attached:
            self.notice_rewrite()
        self._publish()

    def _choose_services(self) -> None:
        if self._services.names and not self._closed:
            self._top.update(self._service_words(), len(self._services.names), self._clock())

    def _service_words(self) -> "array[int]":
        used = len(self._services.names) * len(PLANES) * CELL_BYTES
        return array("Q", bytes(self._kernel.memory("service_cells")[:used]))

    def _publish(self) -> None:
        attached = self._governor.attached and bool(self._follower.boundaries)
        self._published = Published(
            self._follower.state,
            self._follower.labels,
            self._follower.plan,
            self._floor,
            self._governor.ratios() if attached else (0.0, 0.0),
            self._governor.overhead,
            self._options.budget,
            self._follower.replans,
            self._services.refused,
        )

    def describe(self) -> Sequence[MetricSpec]:
        """See `Source`."""
        return SPECS

    def states(self) -> Sequence[MechanismState]:
        """See `Source`."""
        return [self._published.state]

    def status(self, *, names: bool) -> Mapping[str, object]:
        """What /status shows of it; the services with a series of their own only where `names` are allowed."""
        known = list(self._services.names)
        services: dict[str, object] = {"known": len(known), "refused": self._services.refused}
        if names:
            shown = (f"{s.namespace}/{s.name}:{s.port}/{s.protocol.name}" for s in self._top.named(known))
            services["named"] = ", ".join(shown)
        return {**status_rows(self._published), "services": services}

    def explain(self, namespace: str, name: str) -> Mapping[str, object]:
        """What first packets to one Service cost, since the start."""
        known = list(self._services.names)
        rows = service_rows(self._service_words(), known, (namespace, name))
        return {"look-ups of first packets": rows}

    def losses(self) -> Mapping[tuple[str, str], int]:
        """None that are events: unpaired packets have a metric of their own."""
        return {}

    def families(self) -> Iterable[MetricFamily]:
        """See `Source`. Reads the kernel's memory and what was last published."""
        seen = self._published
        yield from bracket_families(seen, self._kernel.memory("cells"), self._kernel.memory("counts"))
        if names := self._services.names:
            # Names may be given meanwhile: the words read next are for at least as many as were counted here.
            known = list(names)
            yield MetricFamily(SERVICE_SPEC, list(self._top.samples(self._service_words(), known, "bracket")))
        yield from own_families(seen)

    def close(self) -> None:
        """Detach. Idempotent."""
        if not self._closed:
            self._closed = True
            self._follower.close()
            self._kernel.close()
