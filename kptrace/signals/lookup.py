# SPDX-License-Identifier: Apache-2.0
"""The lookup signal by hook brackets: plans them, keeps them linked, governs their cost, reports what they measured."""

import time
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Protocol

import structlog

from kptrace.kernel.netns import NetworkNamespace
from kptrace.model.errors import KernelError
from kptrace.model.identity import Snapshot
from kptrace.model.metrics import MetricFamily, MetricSpec, Sample
from kptrace.model.netfilter import BaseChain, IpFamily
from kptrace.model.signal import MechanismState, State
from kptrace.signals import lookup_cells as cells
from kptrace.signals.lookup_floor import measure_floor
from kptrace.signals.lookup_kernel import LookupKernel
from kptrace.signals.lookup_links import BracketNumbers, LinkedBoundaries
from kptrace.signals.lookup_plan import Plan, diff, plan
from kptrace.signals.lookup_services import CELL_BYTES, PLANES, SERVICE_SPEC, ServiceNumbers, ServiceTop
from kptrace.signals.sampling import Governor, Sampling

#: What `make bench` measured on the reference machine (docs/overhead.md): the governor's estimate of cost per packet.
SAMPLED_NS = 130.0
UNSAMPLED_NS = 20.0
TICK_SECONDS = 0.5
GOVERN_SECONDS = 1.0
TOP_SECONDS = 10.0

FLOOR_SPEC = MetricSpec(
    "kptrace_lookup_floor_seconds",
    "gauge",
    "What a bracket around no chain reads in the mean; never subtracted.",
    ("mechanism",),
)
SAMPLING_SPEC = MetricSpec(
    "kptrace_sampling_ratio",
    "gauge",
    "Share of packets that is timed, by walk; 0 while detached.",
    ("signal", "walk"),
)
OVERHEAD_SPEC = MetricSpec(
    "kptrace_overhead_ratio",
    "gauge",
    "Share of one core that the signal's programs cost, as estimated from packet rates.",
    ("signal",),
)
BUDGET_SPEC = MetricSpec(
    "kptrace_overhead_budget_ratio",
    "gauge",
    "Share of one core that the signal's programs may cost; 0 without a limit.",
    ("signal",),
)
REPLANS_SPEC = MetricSpec(
    "kptrace_lookup_replans_total", "counter", "How often the brackets were planned anew."
)
REFUSED_SPEC = MetricSpec(
    "kptrace_lookup_services_refused",
    "gauge",
    "Service addresses beyond what the kernel's map may hold: not measured by name.",
)
SPECS = (
    cells.LOOKUP_SPEC,
    cells.UNPAIRED_SPEC,
    cells.BRACKET_SPEC,
    SERVICE_SPEC,
    FLOOR_SPEC,
    SAMPLING_SPEC,
    OVERHEAD_SPEC,
    BUDGET_SPEC,
    REPLANS_SPEC,
    REFUSED_SPEC,
)


class Chains(Protocol):
    """What is installed in the watched namespace (`kptrace.dataplanes.installed.InstalledChains`)."""

    def changed(self) -> bool:
        """Whether anything may have changed since the last `read`; cheap."""
        ...

    def read(self) -> tuple[BaseChain, ...]:
        """All base chains."""
        ...

    def foreign(self, own: Iterable[tuple[int, int, int]]) -> Mapping[tuple[IpFamily, int], frozenset[int]]:
        """Priorities held by others' BPF links."""
        ...

    def queues(self) -> int | None:
        """Packets waiting in NFQUEUEs; None without a queue."""
        ...

    def close(self) -> None:
        """Let the namespace go."""
        ...


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


@dataclass(frozen=True, slots=True)
class _Published:
    """What scrapes read: replaced as a whole by the loop's thread."""

    state: MechanismState
    labels: Mapping[int, cells.BracketLabels] = field(default_factory=lambda: MappingProxyType({}))
    plan: Plan | None = None
    floor: float | None = None
    ratios: tuple[float, float] = (0.0, 0.0)
    overhead: float = 0.0
    replans: int = 0


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
        self._netns = netns
        self._chains = chains
        self._timers = timers
        self._options = options
        self._clock = clock
        self._log = structlog.get_logger(signal=self.name)
        self._numbers = BracketNumbers()
        self._links = LinkedBoundaries(kernel, netns, self._numbers)
        self._services = ServiceNumbers()
        self._top = ServiceTop()
        self._governor = Governor(options.sampling, options.budget or 1e9)
        self._opened = (0, 0)
        self._governed_at = clock()
        self._overhead = 0.0
        self._floor: float | None = None
        self._plan: Plan | None = None
        self._replans = 0
        self._due = True
        self._refused: set[tuple[IpFamily, int, int]] = set()
        self._ended = False
        self._closed = False
        self._state = self._row(State.OFF, "starting")
        self._published = _Published(self._state)

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
        self._due = True
        self.tick()

    def set_identity(self, snapshot: Snapshot) -> None:
        """Count first packets to these Service addresses from now on."""
        if self._closed:
            return
        self._kernel.set_services(self._services.entries(snapshot.services))

    def tick(self) -> None:
        """Follow what changed: the namespace's end, its queues, its chains."""
        if self._ended or self._closed:
            return
        if self._netns.ended():
            self._let_go()
            return
        if self._due or self._chains.changed():
            self._due = True
            self._replan()
        self._publish()

    def _replan(self) -> None:
        waiting = self._chains.queues()
        if waiting is not None and not self._options.with_nfqueue:
            # Unlinking loses every packet that waits in any queue of the namespace, and linking makes it run a hook
            # twice: what is linked stays as it is.
            linked = bool(self._links.boundaries)
            self._state = self._row(
                State.DEGRADED if linked else State.UNAVAILABLE,
                "nfqueue_present",
                "the namespace has an NFQUEUE: brackets stay as they are (--brackets-with-nfqueue overrides)",
            )
            return
        if waiting:
            self._state = self._row(
                State.DEGRADED, "nfqueue_waiting", f"{waiting} packets wait: re-planning is put off"
            )
            return
        if not self._governor.attached:
            self._links.close()
            self._plan = None
            self._state = self._row(
                State.OFF, "over_budget", "detached: the look-ups cost more than --overhead-budget"
            )
            self._due = False
            return
        chains = self._chains.read()
        own = {(b.family.nfproto, int(b.hook), b.priority) for b in self._links.boundaries}
        held = {place: set(taken) for place, taken in self._chains.foreign(own).items()}
        for family, hook, priority in self._refused:
            held.setdefault((family, hook), set()).add(priority)
        new = plan(chains, held, self._links.boundaries)
        change = diff(Plan((), self._links.boundaries), new)
        taken = self._links.change(change.remove, change.add)
        if change.add or change.remove:
            self._replans += 1
            self._log.info(
                "brackets_planned",
                brackets=len(new.brackets),
                linked=len(change.add),
                unlinked=len(change.remove),
            )
        self._plan = new
        # What holds a refused priority may be nothing that can be listed (SELinux, IPVS): plan around it next time.
        self._refused = {(b.family, int(b.hook), b.priority) for b in taken} | (
            self._refused if taken else set()
        )
        self._due = bool(taken)
        if new.omitted:
            reasons = ", ".join(sorted({each.reason for each in new.omitted}))
            count = sum(len(each.chains) for each in new.omitted)
            self._state = self._row(
                State.DEGRADED, new.omitted[0].reason, f"{count} base chains are not measured: {reasons}"
            )
        elif new.brackets:
            self._state = self._row(State.ACTIVE, "ok", f"{len(new.brackets)} brackets")
        else:
            self._state = self._row(
                State.ACTIVE, "no_base_chains", "no base chain is installed in the watched namespace"
            )

    def _let_go(self) -> None:
        # Each of them pins the namespace: the links, the netlink socket, the namespace's own descriptor.
        self._links.close()
        self._chains.close()
        self._netns.close()
        self._ended = True
        self._state = self._row(State.OFF, "namespace_ended", "the watched network namespace is gone")
        self._log.warning("namespace_ended", path=str(self._netns.path))
        self._publish()

    def _arm(self) -> None:
        self._kernel.configure(armed=True, sampling=self._governor.sampling())

    def _govern(self) -> None:
        if self._ended or self._closed:
            return
        now, opened = self._clock(), cells.opened(self._kernel.memory("counts"))
        elapsed = max(now - self._governed_at, 1e-3)
        first, rest = (new - old for new, old in zip(opened, self._opened, strict=True))
        self._governed_at, self._opened = now, opened
        sampling = self._governor.sampling()
        skipped = rest * (sampling.rest - 1) + first * (sampling.first - 1)
        self._overhead = ((first + rest) * SAMPLED_NS + skipped * UNSAMPLED_NS) / 1e9 / elapsed
        before, self._governor = self._governor, self._governor.step(self._overhead)
        if self._governor.factor != before.factor:
            self._log.warning(
                "sampling_changed", factor=self._governor.factor, overhead=round(self._overhead, 5)
            )
            self._arm()
            if self._governor.attached != before.attached:
                self._due = True
                self._replan()
        self._publish()

    def _choose_services(self) -> None:
        if self._closed or not self._services.names:
            return
        self._top.update(self._service_words(), len(self._services.names), self._clock())

    def _service_words(self) -> "array[int]":
        used = len(self._services.names) * len(PLANES) * CELL_BYTES
        return array("Q", bytes(self._kernel.memory("service_cells")[:used]))

    def _publish(self) -> None:
        attached = self._governor.attached and bool(self._links.boundaries)
        sampling = self._governor.sampling()
        self._published = _Published(
            self._state,
            self._numbers.labels,
            self._plan,
            self._floor,
            (1 / sampling.first, 1 / sampling.rest) if attached else (0.0, 0.0),
            self._overhead,
            self._replans,
        )

    def _row(self, state: State, reason: str, detail: str = "") -> MechanismState:
        return MechanismState(self.name, "bracket", state, reason, detail)

    def describe(self) -> Sequence[MetricSpec]:
        """See `Source`."""
        return SPECS

    def states(self) -> Sequence[MechanismState]:
        """See `Source`."""
        return [self._published.state]

    def families(self) -> Iterable[MetricFamily]:
        """See `Source`. Reads the kernel's memory and what was last published."""
        seen = self._published
        yield MetricFamily(
            cells.LOOKUP_SPEC,
            list(
                cells.lookup_samples(
                    self._kernel.memory("cells"), seen.labels, mechanism="bracket", netns="host"
                )
            ),
        )
        yield MetricFamily(
            cells.UNPAIRED_SPEC, list(cells.unpaired_samples(self._kernel.memory("counts"), seen.labels))
        )
        yield MetricFamily(cells.BRACKET_SPEC, list(_bracket_info(seen.plan)))
        names = self._services.names
        if names:
            yield MetricFamily(SERVICE_SPEC, list(self._top.samples(self._service_words(), names, "bracket")))
        if seen.floor is not None:
            yield MetricFamily(FLOOR_SPEC, [Sample(("bracket",), seen.floor)])
        first, rest = seen.ratios
        yield MetricFamily(
            SAMPLING_SPEC, [Sample(("lookup", "first"), first), Sample(("lookup", "rest"), rest)]
        )
        yield MetricFamily(OVERHEAD_SPEC, [Sample(("lookup",), seen.overhead)])
        yield MetricFamily(BUDGET_SPEC, [Sample(("lookup",), self._options.budget)])
        yield MetricFamily(REPLANS_SPEC, [Sample((), float(seen.replans))])
        yield MetricFamily(REFUSED_SPEC, [Sample((), float(self._services.refused))])

    def close(self) -> None:
        """Detach. Idempotent."""
        if not self._closed:
            self._closed = True
            self._links.close()
            self._kernel.close()


def _bracket_info(current: Plan | None) -> Iterable[Sample]:
    for bracket in current.brackets if current else ():
        for table, chain in sorted(set(bracket.members)):
            labels = (
                bracket.dataplane.value,
                bracket.family.value,
                bracket.hook.label,
                bracket.table,
                bracket.chain,
            )
            yield Sample((*labels, table, chain), 1.0)
