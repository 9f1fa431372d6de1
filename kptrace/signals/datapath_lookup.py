# SPDX-License-Identifier: Apache-2.0
"""The datapath's runs by fentry and fexit: follows the programs, governs its cost, and reports what it measured."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import structlog

from kptrace.dataplanes.cilium.detect import Datapath
from kptrace.kernel.bytecode import Bytecode
from kptrace.kernel.host import Host
from kptrace.model.errors import KernelError, KptraceError, UnsupportedError
from kptrace.model.identity import Snapshot
from kptrace.model.metrics import MetricFamily, MetricSpec
from kptrace.model.signal import MechanismState
from kptrace.signals.datapath_attached import linked_programs
from kptrace.signals.datapath_cells import Group, GroupNumbers
from kptrace.signals.datapath_families import (
    SIGNAL,
    SPECS,
    Programs,
    Published,
    judge,
    own_families,
    run_families,
    status_rows,
)
from kptrace.signals.datapath_floor import measure_floor, tracing_refusal
from kptrace.signals.datapath_services import ConnectServices
from kptrace.signals.datapath_targets import (
    LIMIT,
    ROTATE_SECONDS,
    SUPERSEDED_SECONDS,
    Plan,
    Seen,
    Target,
    TargetPlanner,
    target_of,
)
from kptrace.signals.datapath_tracer import DatapathTracer, ProgramGone
from kptrace.signals.lookup import Timers
from kptrace.signals.lookup_govern import TRACING_PAIR, OverheadGovernor
from kptrace.signals.lookup_services import NAMED_SERIES
from kptrace.signals.sampling import Sampling

LOOK_SECONDS: Final = 2.0
GOVERN_SECONDS: Final = 1.0
RECKON_SECONDS: Final = 10.0


@dataclass(frozen=True, slots=True)
class Options:
    """What a user can set of this signal.

    Attributes:
        sampling: divisors of connects (`first`) and of all other runs (`rest`).
        budget: share of one core; 0 for no limit.
        limit: programs that are measured at a time.
        rotate_seconds: how long an endpoint's programs are measured where others wait.
        named_services: with a series of their own.
    """

    sampling: Sampling = Sampling()
    budget: float = 0.0
    limit: int = LIMIT
    rotate_seconds: float = ROTATE_SECONDS
    named_services: int = NAMED_SERIES


class DatapathLookup:
    """Implements `kptrace.model.signal.Source`."""

    name = SIGNAL

    def __init__(
        self,
        code: Bytecode,
        timers: Timers,
        host: Host,
        options: Options,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make the maps; nothing is attached before `start`.

        Args:
            code: of `datapath_tracer.REQUEST`.
            timers: the daemon's.
            host: where procfs is.
            options: as the user set them.
            clock: seconds.

        Raises:
            KernelError: the maps were refused.
        """
        self._timers = timers
        self._options = options
        self._clock = clock
        self._log = structlog.get_logger(signal=self.name)
        self._tracer = DatapathTracer(code, host)
        self._planner = TargetPlanner(options.limit, options.rotate_seconds)
        self._groups = GroupNumbers()
        self._services = ConnectServices(self._tracer, options.named_services)
        self._governor = OverheadGovernor(options.sampling, options.budget, TRACING_PAIR, clock)
        self._floor: float | None = None
        self._targets: tuple[Target, ...] = ()
        self._shown = Programs()
        self._misses: Mapping[str, int] = {}
        self._refusal = ""
        self._linked: frozenset[int] = frozenset()
        self._blind = ""
        self._closed = False
        self._published = Published(judge(Programs(), "", attached=True))

    def start(self) -> None:
        """Measure the floor, and follow the programs that `see` tells of from then on. May be called in any thread.

        Raises:
            UnsupportedError: the kernel lets no tracing program be attached to a program.
        """
        refusal = tracing_refusal()
        if refusal is not None:
            raise UnsupportedError(
                f"programs cannot be traced: {refusal}",
                remedy="their mean run time is left, by BPF statistics",
            ) from refusal
        try:
            self._floor = measure_floor(self._tracer)
        except KptraceError as error:
            self._log.warning("floor_not_measured", error=str(error))
        self._arm()
        self._timers.call_soon_threadsafe(self._follow)

    def _follow(self) -> None:
        self._publish()
        self._timers.call_every(LOOK_SECONDS, self.look)
        self._timers.call_every(GOVERN_SECONDS, self._govern)
        self._timers.call_every(RECKON_SECONDS, self._reckon)

    def set_identity(self, snapshot: Snapshot) -> None:
        """Count connects to these Service addresses by name from now on."""
        if not self._closed:
            self._services.set_identity(snapshot)

    def see(self, datapath: Datapath) -> None:
        """Follow what is in the kernel now; called whenever that changes."""
        self._targets = tuple(target_of(found) for found in datapath.programs)
        self.look()

    def look(self) -> None:
        """Follow which of the programs are at their hooks, and whose turn it is."""
        if self._closed or not self._governor.attached:
            return
        self._look_at_links()
        seen = Seen(self._targets, self._linked, self._tracer.idle(SUPERSEDED_SECONDS))
        plan = self._planner.plan(seen, self._clock())
        self._carry_out(plan)
        self._shown = Programs(self._planner.measured, plan.waiting, self._planner.refused)
        self._publish()
        if plan.more:
            self._timers.call_soon_threadsafe(self.look)

    def _look_at_links(self) -> None:
        try:
            if self._targets:
                self._linked = linked_programs()
        except KernelError as error:
            # What was known stays: programs are not let go because nothing can be seen.
            if str(error) != self._blind:
                self._blind = str(error)
                self._log.warning("links_not_listed", error=self._blind)

    def _carry_out(self, plan: Plan) -> None:
        for target in plan.attach:
            try:
                self._tracer.attach(target, self._groups.number(Group(target.hook, target.chain)))
            except ProgramGone:
                self._planner.forget(target)
                self._targets = tuple(each for each in self._targets if each != target)
            except KptraceError as error:
                self._planner.refuse(target)
                self._refusal = f"{target.chain} (program {target.program_id}): {error}"
                self._log.warning("program_refused", error=self._refusal)
        for number in plan.release:
            self._tracer.release(number)
        if plan.attach or plan.release:
            self._log.debug("programs_changed", attached=len(plan.attach), released=len(plan.release))

    def _arm(self) -> None:
        self._tracer.configure(armed=True, sampling=self._governor.sampling())

    def _govern(self) -> None:
        if self._closed:
            return
        changed = self._governor.govern(self._tracer.opened(), self._log)
        if changed.sampling:
            self._arm()
        if changed.attached and not self._governor.attached:
            self._carry_out(self._planner.clear())
            self._shown = Programs((), (*self._shown.measured, *self._shown.waiting), self._shown.refused)
        elif changed.attached:
            self.look()
        self._publish()

    def _reckon(self) -> None:
        """What need not be known by the second."""
        if not self._closed:
            self._misses = self._tracer.misses()
            self._services.choose(self._clock())
            self._publish()

    def _publish(self) -> None:
        attached = self._governor.attached
        self._published = Published(
            judge(self._shown, self._refusal, attached=attached),
            self._shown,
            self._misses,
            self._floor,
            self._governor.ratios() if attached and self._shown.measured else (0.0, 0.0),
            self._governor.overhead,
            self._options.budget,
        )

    def describe(self) -> Sequence[MetricSpec]:
        """See `Source`."""
        return SPECS

    def states(self) -> Sequence[MechanismState]:
        """See `Source`."""
        return [self._published.state]

    def status(self, *, names: bool) -> Mapping[str, object]:
        """What /status shows of it."""
        return {**status_rows(self._published), "services of connects": self._services.status(names=names)}

    def explain(self, namespace: str, name: str) -> Mapping[str, object]:
        """What connects to one Service cost, since the start."""
        return {"connects through the datapath": self._services.rows(namespace, name)}

    def losses(self) -> Mapping[tuple[str, str], int]:
        """None that are events: unpaired runs have a metric of their own."""
        return {}

    def families(self) -> Iterable[MetricFamily]:
        """See `Source`. Reads the kernel's memory and what was last published."""
        seen, tracer = self._published, self._tracer
        yield from run_families(seen, tracer.memory("cells"), tracer.memory("counts"), self._groups.numbers)
        yield from self._services.families()
        yield from own_families(seen)

    def close(self) -> None:
        """Detach. Idempotent."""
        if not self._closed:
            self._closed = True
            self._tracer.close()
