# SPDX-License-Identifier: Apache-2.0
"""From the lookup maps' memory to metric samples: pure, and a mirror of the layout in bpf/lookup.bpf.c."""

from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from kptrace.kernel.histogram import LOOKUP_LADDER_NS, SLOTS, on_ladder
from kptrace.model.metrics import HistogramSample, MetricSpec, Sample
from kptrace.model.netfilter import DataPlane, Hook, IpFamily

MAX_BRACKETS = 128
WALKS = ("first", "rest")
CT_STATES = ("established", "related", "new", "untracked", "none")
VERDICTS = ("accept", "drop")
CELLS_PER_BRACKET = len(WALKS) * len(CT_STATES) * len(VERDICTS)
WORDS = 128
SUM_WORD = WORDS - 1
CELL_BYTES = WORDS * 8
#: Losses, in the order of their counts.
UNPAIRED_REASONS = ("queued", "stolen_or_in_flight", "evicted", "opened_elsewhere")
COUNT_KINDS = len(UNPAIRED_REASONS)

LOOKUP_SPEC = MetricSpec(
    "kptrace_lookup_duration_seconds",
    "histogram",
    "Time of one packet's walk through the base chains of one table at one hook: from just before its first rule to"
    " just after its verdict (mechanism bracket: between two netfilter programs; connection tracking's NAT set-up is"
    " included at NAT priorities. fentry, kprobe: from the call of nft_do_chain, ipt_do_table or ip6t_do_table to its"
    " return, which is accept for all but a drop). Of dataplane cilium: of one run of an entry program, from its call to its"
    " return with all programs that it tail-calls (mechanism fentry): table bpf, chain the kind of program, hook where it is"
    " called, walk first for a connect() and all where first packets and the rest are not told apart, ct_state none. Sampled:"
    " see kptrace_sampling_ratio.",
    (
        "mechanism",
        "dataplane",
        "family",
        "hook",
        "table",
        "chain",
        "walk",
        "ct_state",
        "verdict",
        "netns",
    ),
)
UNPAIRED_SPEC = MetricSpec(
    "kptrace_lookup_unpaired_total",
    "counter",
    "Sampled packets (of dataplane cilium: runs) that gave no sample: queued (waited in an NFQUEUE), stolen_or_in_flight"
    " (left the hook unseen), evicted (too many at once), opened_elsewhere; and what the kernel itself counts of all packets,"
    " at hook ~any (of dataplane cilium by hook): recursion_miss (a program was not run because its CPU was in one),"
    " kprobe_miss.",
    ("hook", "reason"),
)
BRACKET_SPEC = MetricSpec(
    "kptrace_bracket_info",
    "info",
    "Which base chain is measured under which table and chain label; chains that share a bracket have the table"
    " ~shared.",
    ("dataplane", "family", "hook", "table", "chain", "member_table", "member_chain"),
)


@dataclass(frozen=True, slots=True, order=True)
class BracketLabels:
    """What a bracket is called: the key under which its counts are kept for ever."""

    dataplane: DataPlane
    family: IpFamily
    hook: Hook
    table: str
    chain: str


def cell_labels(labels: BracketLabels, cell: int, mechanism: str, netns: str) -> tuple[str, ...]:
    """Label values of `LOOKUP_SPEC` for cell 0..19 of a bracket."""
    walk, rest = divmod(cell, len(CT_STATES) * len(VERDICTS))
    ct_state, verdict = divmod(rest, len(VERDICTS))
    return (
        mechanism,
        labels.dataplane.value,
        labels.family.value,
        labels.hook.label,
        labels.table,
        labels.chain,
        WALKS[walk],
        CT_STATES[ct_state],
        VERDICTS[verdict],
        netns,
    )


def lookup_samples(
    memory: memoryview, brackets: Mapping[int, BracketLabels], *, mechanism: str, netns: str
) -> Iterable[HistogramSample]:
    """A histogram for every cell that has a sample.

    Args:
        memory: of the map `cells`.
        brackets: bracket number to its labels; numbers without labels are skipped.
        mechanism: the label value.
        netns: `host` or `pod`.
    """
    for number, labels in sorted(brackets.items()):
        base = number * CELLS_PER_BRACKET * CELL_BYTES
        words = array("Q", bytes(memory[base : base + CELLS_PER_BRACKET * CELL_BYTES]))
        for cell in range(CELLS_PER_BRACKET):
            slots = words[cell * WORDS : cell * WORDS + SLOTS]
            if any(slots):
                yield HistogramSample(
                    cell_labels(labels, cell, mechanism, netns),
                    on_ladder(slots, LOOKUP_LADDER_NS),
                    words[cell * WORDS + SUM_WORD] / 1e9,
                )


def unpaired_samples(memory: memoryview, brackets: Mapping[int, BracketLabels]) -> Iterable[Sample]:
    """The losses by hook and reason; zero for every hook that has a bracket."""
    words = array("Q", bytes(memory[: MAX_BRACKETS * COUNT_KINDS * 8]))
    totals: dict[tuple[str, str], int] = {}
    for number, labels in brackets.items():
        for kind, reason in enumerate(UNPAIRED_REASONS):
            key = (labels.hook.label, reason)
            totals[key] = totals.get(key, 0) + words[number * COUNT_KINDS + kind]
    return [Sample(key, float(value)) for key, value in sorted(totals.items())]
