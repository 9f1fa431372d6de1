# SPDX-License-Identifier: Apache-2.0
"""The datapath's runs where tracing programs are refused: the kernel's own counts, switched on for a second a minute.

Only a mean is left, without verdicts and families. While they are on, every run of every program on the node costs two
readings of the clock more.
"""

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import structlog

from kptrace.dataplanes.cilium.detect import Datapath
from kptrace.kernel.objects import ProgramInfo, open_program, program_info
from kptrace.kernel.run_statistics import RunStatistics
from kptrace.model.errors import KptraceError
from kptrace.model.metrics import MetricFamily, MetricSpec, Sample
from kptrace.model.signal import MechanismState, State
from kptrace.signals.datapath_cells import Group
from kptrace.signals.datapath_families import NO_PROGRAM, PROGRAMS_SPEC, SIGNAL, Programs, programs_family
from kptrace.signals.datapath_floor import tracing_refusal
from kptrace.signals.datapath_targets import Target, target_of
from kptrace.signals.datapath_totals import (
    MECHANISM,
    OBSERVED_SPEC,
    RUN_SECONDS_SPEC,
    RUNS_SPEC,
    RunTotals,
)
from kptrace.signals.lookup import Timers
from kptrace.signals.lookup_families import SAMPLING_SPEC

TICK_SECONDS: Final = 0.5
#: Descriptors that are held while the kernel counts: of what is replaced meanwhile the last counts are read from them.
_MOST_HELD: Final = 512


@dataclass(frozen=True, slots=True)
class Options:
    """What a user can set of this signal.

    Attributes:
        always: have the kernel count all the time.
        window: seconds for which it counts.
        period: seconds from one beginning to the next.
    """

    always: bool = False
    window: float = 1.0
    period: float = 60.0


class DatapathStatistics:
    """Implements `kptrace.model.signal.Source`."""

    name = SIGNAL

    def __init__(
        self,
        timers: Timers,
        options: Options = Options(),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Nothing is switched on before `start`.

        Args:
            timers: the daemon's.
            options: as the user set them.
            clock: seconds.
        """
        self._timers = timers
        self._options = options
        self._clock = clock
        self._log = structlog.get_logger(signal=self.name)
        self._totals = RunTotals()
        self._hold: RunStatistics | None = None
        self._since = 0.0
        self._opened_ns = 0
        self._due = 0.0
        self._held: dict[int, int] = {}
        self._groups: dict[int, Group] = {}
        self._targets: tuple[Target, ...] = ()
        self._observed = 0.0
        self._refusal = ""
        self._trouble = ""
        self._closed = False

    def start(self) -> None:
        """Count every now and then where there is anything to count. May be called in any thread.

        Raises:
            PrivilegeError, UnsupportedError, KernelError: the kernel does not count.
        """
        refusal = tracing_refusal()
        self._refusal = str(refusal) if refusal is not None else ""
        with RunStatistics():
            pass
        self._timers.call_soon_threadsafe(self._begin)

    def _begin(self) -> None:
        self._timers.call_every(TICK_SECONDS, self.tick)

    def see(self, datapath: Datapath) -> None:
        """Follow what is in the kernel now; called whenever that changes."""
        self._targets = tuple(target_of(found) for found in datapath.programs)
        self.tick()

    def tick(self) -> None:
        """Begin to count, take a reading, or end: whatever is due."""
        if self._closed:
            return
        now = self._clock()
        if self._hold is None:
            if self._targets and now >= self._due:
                self._due = now + self._options.period
                self._open()
        elif not self._targets or (not self._options.always and now - self._since >= self._options.window):
            self._end()
        elif self._options.always:
            self._read()

    def _open(self) -> None:
        self._follow()
        self._totals.learn(self._infos())
        try:
            self._hold = RunStatistics()
        except KptraceError as error:
            self._trouble = str(error)
            self._log.warning("statistics_refused", error=self._trouble)
            self._let_go()
            return
        self._trouble = ""
        self._since, self._opened_ns = self._clock(), time.clock_gettime_ns(time.CLOCK_BOOTTIME)

    def _end(self) -> None:
        """Stop counting before the last reading: then nothing is counted that is not read."""
        if self._hold is not None:
            self._hold.close()
            self._hold = None
            self._read()
            self._let_go()

    def _read(self) -> None:
        now = self._clock()
        self._observed += now - self._since
        self._since = now
        # First of what was replaced: it is let go then.
        self._totals.add(self._groups, self._infos())
        before = set(self._held)
        self._follow()
        new = {number: info for number, info in self._infos().items() if number not in before}
        self._totals.learn({n: info for n, info in new.items() if info.loaded_ns < self._opened_ns})
        self._totals.add(self._groups, new)
        self._totals.keep(self._held)

    def _follow(self) -> None:
        """Hold the programs that are there, and no others."""
        targets = {target.program_id: target for target in self._targets}
        for number in self._held.keys() - targets.keys():
            os.close(self._held.pop(number))
            del self._groups[number]
        for number, target in targets.items():
            if number not in self._held and len(self._held) < _MOST_HELD:
                fd = open_program(number)
                if fd is not None:
                    self._held[number] = fd
                    self._groups[number] = Group(target.hook, target.chain)

    def _infos(self) -> Mapping[int, ProgramInfo]:
        return {number: program_info(fd) for number, fd in self._held.items()}

    def _let_go(self) -> None:
        while self._held:
            os.close(self._held.popitem()[1])
        self._groups.clear()
        self._totals.keep(())

    def describe(self) -> Sequence[MetricSpec]:
        """See `Source`."""
        return (RUN_SECONDS_SPEC, RUNS_SPEC, OBSERVED_SPEC, PROGRAMS_SPEC, SAMPLING_SPEC)

    def states(self) -> Sequence[MechanismState]:
        """See `Source`."""
        if self._trouble:
            return [MechanismState(SIGNAL, MECHANISM, State.UNAVAILABLE, "statistics_refused", self._trouble)]
        if not self._targets:
            return [MechanismState(SIGNAL, MECHANISM, State.OFF, "absent", NO_PROGRAM)]
        reason = "tracing_refused" if self._refusal else "mean_only"
        detail = "only the mean run time of each kind of program"
        if self._refusal:
            detail += f": {self._refusal}"
        return [MechanismState(SIGNAL, MECHANISM, State.DEGRADED, reason, detail)]

    def status(self, *, names: bool) -> Mapping[str, object]:
        """What /status shows of it: the mean of each kind of program."""
        del names
        rows = [
            {
                "hook": group.hook,
                "chain": group.chain,
                "runs": total.runs,
                "mean ns": round(total.run_time_ns / total.runs) if total.runs else 0,
            }
            for group, total in sorted(self._totals.totals.items())
        ]
        return {
            "programs": rows,
            "BPF statistics": {"counted seconds": round(self._observed, 1), "share of the time": self._share},
        }

    @property
    def _share(self) -> float:
        options = self._options
        return 1.0 if options.always else options.window / options.period

    def losses(self) -> Mapping[tuple[str, str], int]:
        """None: what is not counted is not asked for."""
        return {}

    def families(self) -> Iterable[MetricFamily]:
        """See `Source`. Reads what was last added up."""
        yield from self._totals.families(self._observed)
        yield programs_family(Programs(mean_only=self._targets))
        yield MetricFamily(SAMPLING_SPEC, [Sample((SIGNAL, "all"), self._share)])

    def close(self) -> None:
        """Switch the counting off. Idempotent."""
        if not self._closed:
            self._closed = True
            if self._hold is not None:
                self._hold.close()
                self._hold = None
            self._let_go()
