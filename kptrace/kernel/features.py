# SPDX-License-Identifier: Apache-2.0
"""What this kernel can do, found out once at start by trying: a frozen table that everything else is planned from."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import structlog

from kptrace.kernel import probes
from kptrace.kernel.capabilities import Capability, missing_capabilities
from kptrace.kernel.host import Host
from kptrace.kernel.support import Calls, Context, State, Support
from kptrace.model.errors import KptraceError

__all__ = [
    "TABLE",
    "Capability",
    "Feature",
    "Features",
    "Row",
    "State",
    "Support",
    "missing_capabilities",
    "probe",
]


@dataclass(frozen=True, slots=True)
class Feature:
    """Something that a kernel has or has not.

    Attributes:
        name: stable name for /status and `kptrace check`.
        since: first version of the mainline kernel that has it; empty where no version is meant.
        summary: what it is, for error messages.
        probe: finds out; it must leave nothing behind.
    """

    name: str
    since: str
    summary: str
    probe: Callable[[Context], Support]


TABLE: Final[tuple[Feature, ...]] = (
    Feature("capabilities", "", "the process's capabilities", probes.capabilities),
    Feature("bpf_syscall", "3.18", "the bpf system call", probes.bpf_syscall),
    Feature("btf_vmlinux", "5.4", "the kernel's BTF", probes.btf_vmlinux),
    Feature("btf_modules", "5.11", "the modules' BTF", probes.btf_modules),
    Feature("netfilter_link", "6.4", "BPF programs on netfilter hooks", probes.netfilter_link),
    Feature("kfunc_dynptr_from_skb", "6.4", "reading packets through dynptrs", probes.kfunc_dynptr_from_skb),
    Feature("kfunc_rdonly_cast", "6.2", "following pointers without helpers", probes.kfunc_rdonly_cast),
    Feature("follow_pointers", "5.5", "reading kernel memory of any kind", probes.follow_pointers),
    Feature("ring_buffer", "5.8", "the BPF ring buffer", probes.ring_buffer),
    Feature("mmapable_array", "5.5", "BPF arrays mapped into memory", probes.mmapable_array),
    Feature(
        "run_statistics", "5.8", "counting runs of BPF programs while somebody asks", probes.run_statistics
    ),
    Feature("tracepoint", "4.7", "BPF programs on tracepoints", probes.tracepoint),
    Feature("raw_tracepoint", "4.17", "BPF programs on raw tracepoints", probes.raw_tracepoint),
    Feature("fentry", "5.5", "BPF programs on function entry and exit", probes.fentry),
    Feature("kprobe", "4.17", "kprobes through perf events", probes.kprobe),
)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table for people and JSON."""

    name: str
    since: str
    summary: str
    state: State
    reason: str
    detail: str


class Features(Mapping[str, Support]):
    """The answers of one probing, by feature name; frozen.

    Attributes:
        lockdown: what the lockdown file says, or what reading it gave.
    """

    def __init__(self, answers: Sequence[tuple[Feature, Support]], lockdown: str = "") -> None:
        self._rows = MappingProxyType({feature.name: (feature, support) for feature, support in answers})
        self.lockdown: Final = lockdown

    def __getitem__(self, name: str) -> Support:
        return self._rows[name][1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def supported(self, *names: str) -> bool:
        """Whether the kernel has all of these; a name that was not probed is a `KeyError`."""
        return all(self[name].supported for name in names)

    def as_rows(self) -> list[Row]:
        """The table in its order."""
        return [
            Row(feature.name, feature.since, feature.summary, support.state, support.reason, support.detail)
            for feature, support in self._rows.values()
        ]


def probe(host: Host, *, table: Sequence[Feature] = TABLE, calls: Calls | None = None) -> Features:
    """Run every probe of the table once.

    A probe that fails in a way of its own makes its feature inconclusive, never the others.
    """
    log = structlog.get_logger()
    context = Context(host, calls or Calls())
    answers = []
    for feature in table:
        try:
            support = feature.probe(context)
        except (KptraceError, OSError) as error:
            support = Support.unknown("probe_failed", str(error))
        answers.append((feature, support))
        log.debug(
            "feature_probed",
            feature=feature.name,
            state=support.state,
            reason=support.reason,
            detail=support.detail,
        )
    return Features(answers, context.lockdown)
