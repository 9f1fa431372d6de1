# SPDX-License-Identifier: Apache-2.0
"""The agent's own metrics beside ours: its version and mode, and by how much its count of map operations differs."""

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Final

import structlog

from kptrace.dataplanes.cilium.detect import Datapath
from kptrace.model.metrics import MetricFamily, MetricSpec, Sample
from kptrace.model.netfilter import DataPlane
from kptrace.model.signal import MechanismState, State
from kptrace.signals.cilium_agent_page import AgentPage, Comparison, Look, Operation, parse
from kptrace.signals.datapath import NOTHING, Loop
from kptrace.signals.map_write_records import MapWrite

PERIOD_SECONDS: Final = 15.0
_JOIN_SECONDS: Final = 2.0
_MECHANISM: Final = "scrape"

INFO: Final = MetricSpec(
    "kptrace_dataplane_info",
    "info",
    "Data planes that tell of themselves: version and mode in their own words (of Cilium its agent's, if it is asked:"
    " --cilium-metrics), empty where they do not say.",
    ("dataplane", "mode", "version"),
)
OPERATIONS: Final = MetricSpec(
    "kptrace_cilium_map_operations_total",
    "counter",
    "Successful updates and deletions of map entries by Cilium's agent, as it counts them itself (since its start) and as"
    " kptrace saw them (since kptrace's start), of the maps that the agent counts.",
    ("map", "operation", "counted_by"),
)
DIFFERENCE: Final = MetricSpec(
    "kptrace_cilium_map_operations_difference",
    "gauge",
    "Map operations that Cilium's agent counts and kptrace did not see, since both were first compared; less than 0 where"
    " kptrace saw more. What happened within about a second of a comparison counts for neither.",
    ("map", "operation"),
)
SCRAPES: Final = MetricSpec(
    "kptrace_cilium_scrapes_total",
    "counter",
    "Looks at the own metrics of Cilium's agent, by outcome.",
    ("outcome",),
)
SPECS: Final = (INFO, OPERATIONS, DIFFERENCE, SCRAPES)


class CiliumAgentSignal:
    """Implements `kptrace.model.signal.Source`. Everything but the fetching happens on the loop's thread."""

    name = "cilium_agent"

    def __init__(
        self,
        fetch: Callable[[], str],
        loop: Loop,
        roles: Callable[[], Mapping[int, str]],
        *,
        optional: bool = False,
        period: float = PERIOD_SECONDS,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """Nothing is asked before something of Cilium's is seen.

        Args:
            fetch: gives the text of its metrics; raises OSError if there is none.
            loop: whose thread owns the state.
            roles: what maps are for, by `MapWrite.map`; empty while nobody tells of map writes.
            optional: whether nobody need answer.
            period: seconds between two looks.
            clock: CLOCK_MONOTONIC, ns.
        """
        self._fetch = fetch
        self._loop = loop
        self._roles = roles
        self._optional = optional
        self._period = period
        self._clock = clock
        self._log = structlog.get_logger(signal=self.name)
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._marked = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kptrace-cilium-agent", daemon=True)
        self._seen = NOTHING
        self._page: AgentPage | None = None
        self._trouble = ""
        self._ours: dict[Operation, int] = {}
        self._least: Mapping[Operation, int] = {}
        self._open: tuple[Look, int] | None = None
        self._comparison = Comparison()
        self._scrapes = {"ok": 0, "failed": 0}
        self._published: tuple[MetricFamily, ...] = ()
        self._publish()

    def close(self) -> None:
        """End. Idempotent."""
        self._stop.set()
        self._wake.set()
        self._marked.set()
        if self._thread.ident is not None:
            self._thread.join(_JOIN_SECONDS)

    def seen(self, datapath: Datapath) -> None:
        """What of Cilium is there now: a listener of the datapath signal."""
        if datapath.agent != self._seen.agent:
            self._comparison.reset()
            self._open = None
        self._seen = datapath
        if not datapath.present:
            self._page, self._trouble = None, ""
        elif self._thread.ident is None and not self._stop.is_set():
            self._thread.start()
        self._wake.set()
        self._publish()

    def written(self, write: MapWrite) -> None:
        """Count one of the agent's."""
        role = self._roles().get(write.map)
        if role is not None and write.tgid == self._seen.agent and write.count:
            key = role, "update" if write.command.adds else "delete"
            self._ours[key] = self._ours.get(key, 0) + write.count

    def settled(self, until_ns: int) -> None:
        """All writes up to then were counted."""
        if self._open is None or until_ns < self._open[1]:
            return
        look, _ = self._open
        self._open = None
        self._comparison.look(Look(look.theirs, look.least, dict(self._ours)))
        self._publish()

    def mark(self) -> None:
        """The agent is about to be asked."""
        self._least = dict(self._ours)
        self._marked.set()

    def take(self, page: AgentPage, end_ns: int) -> None:
        """It answered, and that was at `end_ns` at the latest."""
        if not self._seen.present:
            return
        self._scrapes["ok"] += 1
        self._page, self._trouble = page, ""
        if self._roles() and self._seen.agent is not None:
            self._open = Look(page.operations, self._least, {}), end_ns
        self._publish()

    def fail(self, trouble: str) -> None:
        """It did not."""
        self._scrapes["failed"] += 1
        if not self._trouble and not self._optional:
            self._log.warning("agent_not_read", detail=trouble)
        self._trouble = trouble
        self._publish()

    def describe(self) -> Sequence[MetricSpec]:
        """See `Source`."""
        return SPECS

    def families(self) -> Iterable[MetricFamily]:
        """See `Source`."""
        return self._published

    def states(self) -> Sequence[MechanismState]:
        """See `Source`."""
        state, reason, detail = self._state()
        return [MechanismState(self.name, _MECHANISM, state, reason, detail)]

    def _state(self) -> tuple[State, str, str]:
        if not self._seen.present:
            return State.OFF, "absent", f"nothing of {DataPlane.CILIUM} is in the kernel"
        if self._trouble:
            if self._optional:
                return State.OFF, "no_answer", self._trouble
            return State.DEGRADED, "unreachable", self._trouble
        if self._page is None:
            return State.DEGRADED, "starting", "not read yet"
        if not self._page.operations:
            return State.DEGRADED, "not_counted", "the agent does not tell how often it writes to maps"
        if not self._roles():
            return (
                State.DEGRADED,
                "no_map_writes",
                "the map write signal does not run: there is nothing to compare",
            )
        return State.ACTIVE, "ok", ""

    def losses(self) -> Mapping[tuple[str, str], int]:
        """None: failed looks have a metric of their own."""
        return {}

    def status(self, *, names: bool) -> Mapping[str, object]:
        """Its version and mode."""
        page = self._page
        return {} if page is None else {"cilium agent": {"version": page.version, "mode": page.mode}}

    def _publish(self) -> None:
        page = self._page
        counts, info = [], []
        if page is not None:
            for key, theirs in sorted(page.operations.items()):
                counts.append(Sample((*key, "agent"), float(theirs)))
                if self._roles():
                    counts.append(Sample((*key, "kptrace"), float(self._ours.get(key, 0))))
            if page.version or page.mode:
                info.append(Sample((DataPlane.CILIUM.value, page.mode, page.version), 1.0))
        differences = [Sample(key, float(n)) for key, n in sorted(self._comparison.differences.items())]
        scrapes = [Sample((outcome,), float(count)) for outcome, count in self._scrapes.items()]
        self._published = (
            MetricFamily(INFO, info),
            MetricFamily(OPERATIONS, counts),
            MetricFamily(DIFFERENCE, differences),
            MetricFamily(SCRAPES, scrapes),
        )

    def _run(self) -> None:
        while not self._stop.is_set():
            if self._seen.present:
                self._ask()
                self._stop.wait(self._period)
            else:
                self._wake.wait()
                self._wake.clear()

    def _ask(self) -> None:
        self._marked.clear()
        if self._stop.is_set():
            return
        self._loop.call_soon_threadsafe(self.mark)
        self._marked.wait()
        if self._stop.is_set():
            return
        try:
            page = parse(self._fetch())
        except OSError as error:
            self._loop.call_soon_threadsafe(partial(self.fail, str(error)))
        else:
            self._loop.call_soon_threadsafe(partial(self.take, page, self._clock()))
