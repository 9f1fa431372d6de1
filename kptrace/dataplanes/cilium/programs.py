# SPDX-License-Identifier: Apache-2.0
"""Cilium's entry programs by name: where each is called, and what its return code means. Pure.

Names from pkg/datapath/loader and pkg/socketlb of cilium/cilium. Those of 1.12 and before have no `cil_`; but for
`handle_xgress` they, and that iproute2 may load a program under its section's name, are from memory.
"""

from dataclasses import dataclass, replace
from typing import Final, Literal

from kptrace.dataplanes.cilium.layouts import KERNEL_NAME

Verdict = Literal["accept", "drop"]
Direction = Literal["ingress", "egress", ""]
Of = Literal["endpoint", "host", "network", "overlay", "socket", "xdp"]
Family = Literal["ipv4", "ipv6", ""]

_PREFIX: Final = "cil_"
#: Names of 1.12 and before that are not the newer ones without their prefix.
_OLD: Final = {
    "handle_xgress": "from_container",
    "handle_to_container": "to_container",
    "bpf_xdp_entry": "xdp_entry",
}
_TC_SHOT: Final = 2
_XDP_ACCEPTS: Final = frozenset(
    {2, 3, 4}
)  # XDP_PASS, XDP_TX, XDP_REDIRECT; codes beyond are as good as XDP_ABORTED


@dataclass(frozen=True, slots=True)
class ProgramKind:
    """A kind of entry program: one that the kernel calls itself.

    Attributes:
        chain: its name without `cil_`, as a label value: `from_container`, `sock4_connect`.
        hook: where it is called: tc_ingress, tc_egress, xdp, cgroup_connect, cgroup_sendmsg, cgroup_recvmsg, ...
        direction: of the traffic as its endpoint, node or socket sees it: ingress or egress; empty where there is none.
        of: whose traffic it sees: endpoint, host, network, overlay, socket or xdp.
        family: of its packets; empty where both come.
        priority: which to measure first, 0 before all others.
        certain: whether the name alone says that it is Cilium's; names of 1.12 and before may be anyone's.
    """

    chain: str
    hook: str
    direction: Direction
    of: Of
    family: Family
    priority: int
    certain: bool = True


def _sockets() -> tuple[ProgramKind, ...]:
    """The programs on the root cgroup: a call of each concerns every socket of the node."""
    calls: tuple[tuple[str, Direction, int], ...] = (
        ("connect", "egress", 0),
        ("sendmsg", "egress", 0),
        ("recvmsg", "ingress", 0),
        ("getpeername", "", 4),
        ("post_bind", "", 4),
        ("pre_bind", "", 4),
    )
    families: tuple[tuple[int, Family], ...] = ((4, "ipv4"), (6, "ipv6"))
    return tuple(
        ProgramKind(f"sock{number}_{call}", f"cgroup_{call}", direction, "socket", family, priority)
        for number, family in families
        for call, direction, priority in calls
    )


#: Few of a kind and much traffic first, those of each pod after them, then what no packet waits for.
KINDS: Final = (
    *_sockets(),
    ProgramKind("sock_release", "cgroup_sock_release", "", "socket", "", 4),
    ProgramKind("xdp_entry", "xdp", "ingress", "xdp", "", 1),
    ProgramKind("from_netdev", "tc_ingress", "ingress", "network", "", 1),
    ProgramKind("to_netdev", "tc_egress", "egress", "network", "", 1),
    ProgramKind("from_overlay", "tc_ingress", "ingress", "overlay", "", 1),
    ProgramKind("to_overlay", "tc_egress", "egress", "overlay", "", 1),
    ProgramKind("from_network", "tc_ingress", "ingress", "network", "", 2),
    ProgramKind("from_wireguard", "tc_ingress", "ingress", "network", "", 2),
    ProgramKind("to_wireguard", "tc_egress", "egress", "network", "", 2),
    # At both ends of the pair cilium_host and cilium_net, into and out of the host.
    ProgramKind("to_host", "tc_ingress", "ingress", "host", "", 2),
    ProgramKind("from_host", "tc_egress", "egress", "host", "", 2),
    # On the host's end of a pod's pair: what comes in there leaves the pod.
    ProgramKind("from_container", "tc_ingress", "egress", "endpoint", "", 3),
    ProgramKind("to_container", "tc_egress", "ingress", "endpoint", "", 3),
)


def _names() -> dict[str, ProgramKind]:
    by_chain = {kind.chain: kind for kind in KINDS}
    names = {chain: replace(kind, certain=False) for chain, kind in by_chain.items()}
    names |= {old: replace(by_chain[chain], certain=False) for old, chain in _OLD.items()}
    names |= {_PREFIX + chain: kind for chain, kind in by_chain.items()}
    # What the kernel keeps of them is as clear: no two of these begin alike for so long.
    return names | {name[:KERNEL_NAME]: kind for name, kind in names.items()}


_NAMES: Final = _names()


def kind_of(name: str) -> ProgramKind | None:
    """The kind of an entry program.

    Args:
        name: whole, or the 15 characters of it that the kernel keeps; with hyphens where a section named the program.

    Returns:
        None for others' programs, and for Cilium's that are only tail-called.
    """
    return _NAMES.get(name.replace("-", "_"))


def verdict(kind: ProgramKind, code: int) -> Verdict:
    """What a return code (32 bits, signed or not) means for the packet or the system call.

    The codes are those of `TC_ACT_*`, which tcx and netkit use too, `XDP_*`, and for sockets 0 to refuse the call. After a
    tail call the code is that of the last program.
    """
    if kind.of == "xdp":
        return "accept" if code in _XDP_ACCEPTS else "drop"
    return "drop" if code == (0 if kind.of == "socket" else _TC_SHOT) else "accept"
