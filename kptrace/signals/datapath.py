# SPDX-License-Identifier: Apache-2.0
"""The datapath signal: which of Cilium's maps and programs are in the kernel; others follow what it sees."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Final, Protocol

import structlog

from kptrace.dataplanes.cilium.detect import Datapath
from kptrace.dataplanes.cilium.service_state import FAMILY_OF, ServiceState
from kptrace.kernel.host import Host
from kptrace.model.metrics import MetricFamily, MetricSpec, Sample
from kptrace.model.netfilter import DataPlane
from kptrace.model.signal import MechanismState, State
from kptrace.signals.datapath_watch import DatapathWatch, Reading

AGENT: Final = MetricSpec(
    "kptrace_datapath_agent_up", "gauge", "Whether Cilium's agent runs, where anything of Cilium's is there."
)
UNREADABLE: Final = MetricSpec(
    "kptrace_datapath_problems",
    "gauge",
    "Maps and programs of Cilium's that cannot be read, by an unknown layout mostly; /status says which and why.",
)

NOTHING: Final = Datapath(MappingProxyType({}), (), None, ())
Listener = Callable[[Datapath], None]


class Loop(Protocol):
    """The part of the daemon's loop that is needed."""

    def call_soon_threadsafe(self, callback: Callable[[], None]) -> None:
        """Call from the loop's thread."""
        ...


class DatapathSignal:
    """Implements `kptrace.model.signal.Source`. All but that is for the loop's thread."""

    name = "datapath"

    def __init__(self, loop: Loop, host: Host = Host()) -> None:
        """Nothing is looked for before `start`.

        Args:
            loop: the daemon's.
            host: where the BPF file system and procfs are.
        """
        self._log = structlog.get_logger(signal=self.name)
        self._listeners: list[Listener] = []
        self._waiting: Callable[[ServiceState, int], None] | None = None
        self._seen = NOTHING
        self._watch = DatapathWatch(
            host,
            lambda seen: loop.call_soon_threadsafe(lambda: self._take(seen)),
            lambda reading: loop.call_soon_threadsafe(lambda: self._loaded(reading)),
        )

    def start(self) -> None:
        """Look now, and again for as long as the daemon lives."""
        self._watch.start()

    def close(self) -> None:
        """Look no more. Idempotent."""
        self._watch.close()

    def subscribe(self, listener: Listener) -> None:
        """Tell what is there now, and whenever that changes."""
        self._listeners.append(listener)
        listener(self._seen)

    def read_services(self, deliver: Callable[[ServiceState, int], None]) -> None:
        """Read the service maps anew; what is in them comes with the time at which reading began, ns."""
        self._waiting = deliver
        self._watch.read()

    @property
    def programs_services(self) -> bool:
        """Whether Cilium's service maps are there."""
        return any(role in self._seen.maps for role in FAMILY_OF)

    def _take(self, seen: Datapath) -> None:
        if bool(seen.problems) and seen.problems != self._seen.problems:
            self._log.warning("datapath_not_read", detail="; ".join(seen.problems))
        self._seen = seen
        for listener in self._listeners:
            listener(seen)

    def _loaded(self, reading: Reading) -> None:
        if self._waiting is not None:
            self._waiting(reading.state, reading.begin_ns)

    def losses(self) -> Mapping[tuple[str, str], int]:
        """Looking that failed: it is done again."""
        return {(self.name, "look_failed"): self._watch.failed}

    def status(self, *, names: bool) -> Mapping[str, object]:
        """What /status shows of it."""
        seen = self._seen
        if not seen.present:
            return {}
        maps = [
            {
                "role": role.value,
                "name": each.name,
                "entries at most": each.info.max_entries,
                "id": each.info.id,
            }
            for role, found in sorted(seen.maps.items())
            for each in found[:1]
        ]
        kinds = Counter((each.kind.hook, each.kind.chain) for each in seen.programs)
        programs = [
            {"hook": hook, "chain": chain, "programs": n} for (hook, chain), n in sorted(kinds.items())
        ]
        section = {"agent": seen.agent or "not seen", "problems": "; ".join(seen.problems) or "none"}
        return {"datapath": section, "datapath maps": maps, "datapath programs": programs}

    def describe(self) -> Sequence[MetricSpec]:
        """See `Source`."""
        return AGENT, UNREADABLE

    def families(self) -> Iterable[MetricFamily]:
        """See `Source`."""
        seen = self._seen
        agent = [Sample((), float(seen.agent is not None))] if seen.present else []
        problems = [Sample((), float(len(seen.problems)))] if seen.present else []
        return MetricFamily(AGENT, agent), MetricFamily(UNREADABLE, problems)

    def states(self) -> Sequence[MechanismState]:
        """See `Source`."""
        seen = self._seen
        if trouble := self._watch.trouble:
            return [MechanismState(self.name, "bpf_objects", State.DEGRADED, "look_failed", trouble)]
        if not seen.present:
            detail = f"nothing of {DataPlane.CILIUM} is in the kernel"
            return [MechanismState(self.name, "bpf_objects", State.OFF, "absent", detail)]
        if seen.problems:
            detail = "; ".join(seen.problems)
            return [MechanismState(self.name, "bpf_objects", State.DEGRADED, "not_all_readable", detail)]
        return [MechanismState(self.name, "bpf_objects", State.ACTIVE)]
