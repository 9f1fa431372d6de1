# SPDX-License-Identifier: Apache-2.0
"""The metric families of the datapath's runs, from the kernel's memory and what was last published. Pure."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

from kptrace.model.metrics import MetricFamily, MetricSpec, Sample
from kptrace.model.netfilter import DataPlane
from kptrace.model.signal import MechanismState, State
from kptrace.signals import datapath_cells as cells
from kptrace.signals.datapath_targets import Target
from kptrace.signals.lookup_cells import LOOKUP_SPEC, UNPAIRED_SPEC
from kptrace.signals.lookup_families import BUDGET_SPEC, FLOOR_SPEC, OVERHEAD_SPEC, SAMPLING_SPEC
from kptrace.signals.lookup_services import SERVICE_SPEC

SIGNAL: Final = "datapath_lookup"
NO_PROGRAM: Final = "no entry program of Cilium's is loaded"
PROGRAMS_SPEC = MetricSpec(
    "kptrace_lookup_programs",
    "gauge",
    "Entry programs of the data plane, by whether their runs are measured: measured, waiting (more than can be measured at"
    " a time: they are in turn), refused (by the kernel), mean_only (where tracing programs are refused).",
    ("dataplane", "hook", "chain", "state"),
)
SPECS = (
    LOOKUP_SPEC,
    UNPAIRED_SPEC,
    SERVICE_SPEC,
    FLOOR_SPEC,
    PROGRAMS_SPEC,
    SAMPLING_SPEC,
    OVERHEAD_SPEC,
    BUDGET_SPEC,
)


@dataclass(frozen=True, slots=True)
class Programs:
    """What is measured, and what is not."""

    measured: tuple[Target, ...] = ()
    waiting: tuple[Target, ...] = ()
    refused: tuple[Target, ...] = ()
    mean_only: tuple[Target, ...] = ()

    def counts(self) -> Mapping[tuple[str, str, str], int]:
        """By hook, chain and state; a state that none of a hook and chain is in is not among them."""
        states: Sequence[tuple[str, tuple[Target, ...]]] = (
            ("measured", self.measured),
            ("waiting", self.waiting),
            ("refused", self.refused),
            ("mean_only", self.mean_only),
        )
        return Counter((each.hook, each.chain, state) for state, targets in states for each in targets)


@dataclass(frozen=True, slots=True)
class Published:
    """What scrapes read: replaced as a whole by the loop's thread.

    Attributes:
        state: of the mechanism.
        programs: what is measured, and what is not.
        misses: by hook, programs that the kernel did not run.
        floor: seconds, if it was measured.
        ratios: sampled share of connects and of all other runs.
        overhead, budget: share of one core.
    """

    state: MechanismState
    programs: Programs = Programs()
    misses: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    floor: float | None = None
    ratios: tuple[float, float] = (0.0, 0.0)
    overhead: float = 0.0
    budget: float = 0.0


def judge(programs: Programs, refusal: str, *, attached: bool) -> MechanismState:
    """How far the datapath is measured.

    Args:
        programs: what is measured, and what is not.
        refusal: what the kernel last said.
        attached: whether anything is to be attached at all.
    """

    def row(state: State, reason: str, detail: str) -> MechanismState:
        return MechanismState(SIGNAL, cells.MECHANISM, state, reason, detail)

    if not attached:
        return row(State.OFF, "over_budget", "detached: the runs cost more than --overhead-budget")
    measured, waiting, refused = len(programs.measured), len(programs.waiting), len(programs.refused)
    detail = f"{measured} programs are measured"
    if waiting:
        detail += f", {waiting} wait for their turn"
    if refused:
        state = State.DEGRADED if measured else State.UNAVAILABLE
        return row(state, "attach_refused", f"{detail}, {refused} were refused; the last: {refusal}")
    if not measured and not waiting:
        return row(State.OFF, "absent", NO_PROGRAM)
    return row(State.ACTIVE, "rotating" if waiting else "ok", detail)


def run_families(
    seen: Published, memory: memoryview, counts: memoryview, groups: Mapping[cells.Group, int]
) -> Iterable[MetricFamily]:
    """What was measured, and what was lost."""
    yield MetricFamily(LOOKUP_SPEC, list(cells.lookup_samples(memory, groups)))
    yield MetricFamily(UNPAIRED_SPEC, cells.unpaired_samples(counts, groups, seen.misses))


def programs_family(programs: Programs) -> MetricFamily:
    """How many programs of each kind are in which state."""
    counts = sorted(programs.counts().items())
    return MetricFamily(
        PROGRAMS_SPEC, [Sample((DataPlane.CILIUM.value, *key), float(count)) for key, count in counts]
    )


def own_families(seen: Published) -> Iterable[MetricFamily]:
    """What the signal says of itself."""
    if seen.floor is not None:
        yield MetricFamily(FLOOR_SPEC, [Sample((cells.MECHANISM,), seen.floor)])
    yield programs_family(seen.programs)
    first, rest = seen.ratios
    yield MetricFamily(SAMPLING_SPEC, [Sample((SIGNAL, "first"), first), Sample((SIGNAL, "all"), rest)])
    yield MetricFamily(OVERHEAD_SPEC, [Sample((SIGNAL,), seen.overhead)])
    yield MetricFamily(BUDGET_SPEC, [Sample((SIGNAL,), seen.budget)])


def status_rows(seen: Published) -> Mapping[str, object]:
    """What /status shows: programs by kind, and the sampling."""
    rows: dict[tuple[str, str], dict[str, object]] = {}
    for (hook, chain, state), count in sorted(seen.programs.counts().items()):
        rows.setdefault((hook, chain), {"hook": hook, "chain": chain})[state] = count
    first, rest = seen.ratios
    return {
        "programs": list(rows.values()),
        "walk": "first: connect(), each of which is a connection's first; all: first packets and the rest, which a"
        " datapath program does not tell apart",
        "datapath sampling": {
            "connects": first,
            "all other runs": rest,
            "overhead": seen.overhead,
            "overhead budget": seen.budget or "none",
            "floor in ns": round(seen.floor * 1e9, 1) if seen.floor is not None else "not measured",
        },
    }
