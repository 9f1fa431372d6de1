# SPDX-License-Identifier: Apache-2.0
"""The lookup signal's metric families, from the kernel's memory and what was last published. Pure."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from kptrace.model.metrics import MetricFamily, MetricSpec, Sample
from kptrace.model.signal import MechanismState
from kptrace.signals import lookup_cells as cells
from kptrace.signals.lookup_plan import Plan
from kptrace.signals.lookup_services import SERVICE_SPEC

FLOOR_SPEC = MetricSpec(
    "kptrace_lookup_floor_seconds",
    "gauge",
    "What a bracket around no chain reads in the mean, and what a pair (mechanism fentry, of dataplane cilium) around an"
    " empty program reads; never subtracted.",
    ("mechanism",),
)
SAMPLING_SPEC = MetricSpec(
    "kptrace_sampling_ratio",
    "gauge",
    "Share of packets that is timed, by walk; 0 while detached. Of signal datapath_lookup: of runs; by BPF statistics the"
    " share of the time in which all are.",
    ("signal", "walk"),
)
OVERHEAD_SPEC = MetricSpec(
    "kptrace_overhead_ratio",
    "gauge",
    "Share of one core that the signal's programs cost, estimated from packet rates and the costs in docs/overhead.md. Of"
    " brackets: beyond what two netfilter programs cost that do nothing.",
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


@dataclass(frozen=True, slots=True)
class Published:
    """What scrapes read: replaced as a whole by the loop's thread.

    Attributes:
        state: of the mechanism.
        labels: of every bracket number.
        plan: what is linked.
        floor: seconds, if it was measured.
        ratios: sampled share of first packets and of the rest.
        overhead, budget: share of one core.
        replans, refused: counts.
    """

    state: MechanismState
    labels: Mapping[int, cells.BracketLabels] = field(default_factory=lambda: MappingProxyType({}))
    plan: Plan | None = None
    floor: float | None = None
    ratios: tuple[float, float] = (0.0, 0.0)
    overhead: float = 0.0
    budget: float = 0.0
    replans: int = 0
    refused: int = 0


def bracket_families(seen: Published, memory: memoryview, counts: memoryview) -> Iterable[MetricFamily]:
    """What the brackets measured, and what they lost."""
    samples = cells.lookup_samples(memory, seen.labels, mechanism="bracket", netns="host")
    yield MetricFamily(cells.LOOKUP_SPEC, list(samples))
    yield MetricFamily(cells.UNPAIRED_SPEC, list(cells.unpaired_samples(counts, seen.labels)))
    yield MetricFamily(cells.BRACKET_SPEC, list(_bracket_info(seen.plan)))


def own_families(seen: Published) -> Iterable[MetricFamily]:
    """What the signal says of itself."""
    if seen.floor is not None:
        yield MetricFamily(FLOOR_SPEC, [Sample(("bracket",), seen.floor)])
    first, rest = seen.ratios
    yield MetricFamily(SAMPLING_SPEC, [Sample(("lookup", "first"), first), Sample(("lookup", "rest"), rest)])
    yield MetricFamily(OVERHEAD_SPEC, [Sample(("lookup",), seen.overhead)])
    yield MetricFamily(BUDGET_SPEC, [Sample(("lookup",), seen.budget)])
    yield MetricFamily(REPLANS_SPEC, [Sample((), float(seen.replans))])
    yield MetricFamily(REFUSED_SPEC, [Sample((), float(seen.refused))])


def status_rows(seen: Published) -> Mapping[str, object]:
    """What /status shows: the brackets with what is in each, and the sampling."""
    brackets = [
        {
            "dataplane": bracket.dataplane.value,
            "family": bracket.family.value,
            "hook": bracket.hook.label,
            "chains": ", ".join(f"{table} {chain}" for table, chain in sorted(set(bracket.members))),
        }
        for bracket in (seen.plan.brackets if seen.plan else ())
    ]
    first, rest = seen.ratios
    sampling = {
        "first packets": first,
        "the rest": rest,
        "overhead": seen.overhead,
        "overhead budget": seen.budget or "none",
        "floor in ns": round(seen.floor * 1e9, 1) if seen.floor is not None else "not measured",
    }
    return {"brackets": brackets, "sampling": sampling}


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
