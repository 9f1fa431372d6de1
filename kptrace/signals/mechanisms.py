# SPDX-License-Identifier: Apache-2.0
"""Which mechanisms there are for each signal, in the order of preference, and what each needs of the kernel. Pure."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from kptrace.kernel.features import Support
from kptrace.model.signal import MechanismState, State


@dataclass(frozen=True, slots=True)
class Mechanism:
    """One way to measure a signal.

    Attributes:
        signal, name: as in `kptrace_signal_state`.
        needs: names in `kptrace.kernel.features.TABLE`.
        built: whether this version of kptrace has it.
    """

    signal: str
    name: str
    needs: tuple[str, ...]
    built: bool = True


#: Features whose probes are slow (they read the BTF, or try many things), and which nothing that starts depends on:
#: the compiler reads the BTF itself.
SLOW_FEATURES = frozenset({"btf_vmlinux", "kfunc_dynptr_from_skb", "kfunc_rdonly_cast", "fentry", "kprobe"})

_SYSCALLS = ("btf_vmlinux", "tracepoint", "raw_tracepoint", "ring_buffer", "follow_pointers")

MECHANISMS = (
    Mechanism(
        "lookup",
        "bracket",
        (
            "bpf_syscall",
            "btf_vmlinux",
            "netfilter_link",
            "kfunc_dynptr_from_skb",
            "kfunc_rdonly_cast",
            "mmapable_array",
            "raw_tracepoint",
        ),
    ),
    Mechanism(
        "lookup",
        "fentry",
        ("bpf_syscall", "btf_vmlinux", "mmapable_array", "follow_pointers", "btf_modules", "fentry"),
    ),
    Mechanism(
        "lookup", "kprobe", ("bpf_syscall", "btf_vmlinux", "mmapable_array", "follow_pointers", "kprobe")
    ),
    Mechanism("sync", "tracepoint", ("btf_vmlinux", "raw_tracepoint", "ring_buffer", "follow_pointers")),
    Mechanism("rewrite", "tracepoint", _SYSCALLS),
    Mechanism(
        "rewrite_phases",
        "fentry",
        (
            "bpf_syscall",
            "btf_vmlinux",
            "ring_buffer",
            "mmapable_array",
            "follow_pointers",
            "btf_modules",
            "fentry",
        ),
    ),
    Mechanism(
        "rewrite_phases",
        "kprobe",
        ("bpf_syscall", "btf_vmlinux", "ring_buffer", "mmapable_array", "follow_pointers", "kprobe"),
    ),
    Mechanism("xtables_lock", "tracepoint", _SYSCALLS),
    Mechanism("datapath", "bpf_objects", ("bpf_syscall",)),
    Mechanism("datapath_inventory", "map_read", ("bpf_syscall",)),
    Mechanism("cilium_agent", "scrape", ()),
    Mechanism(
        "datapath_lookup",
        "fentry",
        ("bpf_syscall", "btf_vmlinux", "mmapable_array", "follow_pointers", "fentry"),
    ),
    Mechanism("datapath_lookup", "bpf_stats", ("bpf_syscall", "run_statistics")),
    Mechanism("map_write", "tracepoint", _SYSCALLS),
    # It joins what the map write signal tells.
    Mechanism("datapath_programming", "map_write", _SYSCALLS),
    # It joins what the rewrite and sync signals tell.
    Mechanism("programming", "watch", _SYSCALLS),
    Mechanism("drift", "netlink", ()),
    Mechanism("kube_proxy", "scrape", ()),
)


def judge(mechanism: Mechanism, features: Mapping[str, Support]) -> MechanismState:
    """Whether a mechanism can be used here; if not, the reason and detail of the first feature that is missing.

    Features that were not probed count as present: what needs them fails later and says why.
    """
    for name in mechanism.needs:
        support = features.get(name)
        if support is not None and not support.supported:
            detail = f"{name}: {support.detail}"
            return MechanismState(mechanism.signal, mechanism.name, State.UNAVAILABLE, support.reason, detail)
    if not mechanism.built:
        return MechanismState(
            mechanism.signal,
            mechanism.name,
            State.OFF,
            "not_built",
            "this version of kptrace does not have it",
        )
    return MechanismState(mechanism.signal, mechanism.name, State.ACTIVE)


def judge_all(
    features: Mapping[str, Support], mechanisms: Iterable[Mechanism] = MECHANISMS
) -> list[MechanismState]:
    """The state of every mechanism, in the order of the table."""
    return [judge(mechanism, features) for mechanism in mechanisms]
