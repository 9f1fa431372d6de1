# SPDX-License-Identifier: Apache-2.0
"""The kernel's own run counts of programs, summed over those of one kind: what was counted while we had it count. Pure."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Final

from kptrace.kernel.objects import ProgramInfo
from kptrace.model.metrics import MetricFamily, MetricSpec, Sample
from kptrace.model.netfilter import DataPlane
from kptrace.signals.datapath_cells import Group

MECHANISM: Final = "bpf_stats"
_LABELS: Final = ("dataplane", "hook", "chain", "mechanism")
RUN_SECONDS_SPEC = MetricSpec(
    "kptrace_bpf_program_run_seconds_total",
    "counter",
    "Time in the data plane's entry programs while kptrace had the kernel count it (see"
    " kptrace_bpf_program_observed_seconds_total): of each, with all programs that it tail-calls. Divided by"
    " kptrace_bpf_program_runs_total it is the mean of a run. Where tracing programs are refused.",
    _LABELS,
)
RUNS_SPEC = MetricSpec(
    "kptrace_bpf_program_runs_total",
    "counter",
    "Runs of the data plane's entry programs while kptrace had the kernel count them.",
    _LABELS,
)
OBSERVED_SPEC = MetricSpec(
    "kptrace_bpf_program_observed_seconds_total",
    "counter",
    "How long kptrace had the kernel count runs of programs: a second a minute unless it is told otherwise, since that costs"
    " every run on the node two readings of the clock.",
    ("mechanism",),
)


@dataclass(slots=True)
class Total:
    """Of all programs of a group: counters that never go back."""

    runs: int = 0
    run_time_ns: int = 0


@dataclass(slots=True)
class RunTotals:
    """Adds up what each program gained between two readings.

    Attributes:
        totals: by group; replaced, never changed, where scrapes read it.
    """

    totals: dict[Group, Total] = field(default_factory=dict)
    _known: dict[int, tuple[int, int]] = field(default_factory=dict)

    def learn(self, infos: Mapping[int, ProgramInfo]) -> None:
        """These programs are seen for the first time since counting began: what they ran before now is nobody's."""
        self._known |= {number: (info.run_count, info.run_time_ns) for number, info in infos.items()}

    def add(self, groups: Mapping[int, Group], infos: Mapping[int, ProgramInfo]) -> None:
        """Take a reading: of a program that was not learnt all runs are ours, as it came after counting began.

        Args:
            groups: of these programs, by id.
            infos: what the kernel tells of them now.
        """
        totals = {group: Total(total.runs, total.run_time_ns) for group, total in self.totals.items()}
        for number, info in infos.items():
            runs, run_time = self._known.get(number, (0, 0))
            total = totals.setdefault(groups[number], Total())
            total.runs += info.run_count - runs
            total.run_time_ns += info.run_time_ns - run_time
            self._known[number] = info.run_count, info.run_time_ns
        self.totals = totals

    def keep(self, numbers: Collection[int]) -> None:
        """Forget all programs but these, whose ids may be read again."""
        self._known = {number: counts for number, counts in self._known.items() if number in numbers}

    def families(self, observed: float) -> list[MetricFamily]:
        """The metrics; `observed` is in seconds."""
        rows = [
            ((DataPlane.CILIUM.value, group.hook, group.chain, MECHANISM), total)
            for group, total in sorted(self.totals.items())
        ]
        return [
            MetricFamily(RUN_SECONDS_SPEC, [Sample(key, total.run_time_ns / 1e9) for key, total in rows]),
            MetricFamily(RUNS_SPEC, [Sample(key, float(total.runs)) for key, total in rows]),
            MetricFamily(OBSERVED_SPEC, [Sample((MECHANISM,), observed)]),
        ]
