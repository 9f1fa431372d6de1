# SPDX-License-Identifier: Apache-2.0
"""The kernel side of the rewrite phases: the maps, the ring, and the functions that have programs at their ends."""

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from threading import Lock
from types import MappingProxyType
from typing import Final

from kptrace.kernel.btf import Btf, BtfMissing
from kptrace.kernel.bytecode import Bytecode, link
from kptrace.kernel.compile import Request
from kptrace.kernel.events import RingBuffer
from kptrace.kernel.functions import AttachedFunction, Function, Mechanism, Misses
from kptrace.kernel.host import Host
from kptrace.kernel.maps import Map
from kptrace.signals.task_facts import RDONLY_CAST, kfuncs

_FACTS: Final = {
    "KPT_SKB_SK": "offset:sk_buff:sk",
    "KPT_SKB_LEN": "offset:sk_buff:len",
    "KPT_SKB_CB": "offset:sk_buff:cb",
    "KPT_PARMS_PORTID": "offset:netlink_skb_parms:portid",
    "KPT_SOCK_NET": "offset:sock:__sk_common.skc_net.net",
    "KPT_NET_INUM": "offset:net:ns.inum",
    "KPT_NOTIFY_NET": "offset:netlink_notify:net",
    "KPT_NOTIFY_PORTID": "offset:netlink_notify:portid",
    "KPT_NOTIFY_PROTOCOL": "offset:netlink_notify:protocol",
}

#: What the daemon compiles for each mechanism: nothing of it depends on a module that may come later.
REQUESTS: Final[Mapping[Mechanism, Request]] = MappingProxyType(
    {
        "fentry": Request(
            "rewrite_phases.bpf.c",
            facts={**_FACTS, RDONLY_CAST: "?func:bpf_rdonly_cast", "KPT_PT_REGS": "struct:pt_regs"},
            defines={"KPT_TYPED": 1},
        ),
        "kprobe": Request("rewrite_phases.bpf.c", facts=_FACTS),
    }
)

LOST_REASONS: Final = ("ring_full", "running_full")
_LOST: Final = struct.Struct(f"={len(LOST_REASONS)}Q")


class Hole(IntEnum):
    """What is filled in when a program is loaded: the C source's enumeration has the same order."""

    ARG_0 = 0
    ARG_1 = 1
    ARG_2 = 2
    RESULT = 3
    WATCHED_NETNS = 4
    WORK_PER_NET = 5
    NET_WORK = 6
    NET_DESTROYED = 7
    TRANS_NET = 8


Holes = Mapping[Hole, int]


def destroy_holes(btf: Btf) -> Holes:
    """Where the work of `nf_tables_trans_destroy_work` is, by the BTF that has it; one for all namespaces where unknown."""
    try:
        return {
            Hole.WORK_PER_NET: 1,
            Hole.NET_WORK: btf.member_offset("nftables_pernet", "destroy_work"),
            Hole.NET_DESTROYED: btf.member_offset("nftables_pernet", "destroy_list"),
            Hole.TRANS_NET: btf.member_offset("nft_trans", "net") - btf.member_offset("nft_trans", "list"),
        }
    except BtfMissing:
        return dict.fromkeys((Hole.WORK_PER_NET, Hole.NET_WORK, Hole.NET_DESTROYED, Hole.TRANS_NET), 0)


@dataclass(frozen=True, slots=True)
class Hook:
    """A function that begins or ends a phase.

    Attributes:
        function: as the kernel calls it.
        module: where it is unless it is built in.
        stem: its programs are `<stem>_enter` and `<stem>_leave`.
    """

    function: str
    module: str
    stem: str


#: Inner functions come before those that they run in: no outer one is seen without them.
HOOKS: Final = (
    Hook("nf_tables_commit", "nf_tables", "commit"),
    Hook("nf_tables_abort", "nf_tables", "abort"),
    Hook("nf_tables_trans_destroy_work", "nf_tables", "destroy"),
    Hook("nft_rcv_nl_event", "nf_tables", "close"),
    Hook("nfnetlink_rcv_batch", "nfnetlink", "batch"),
    Hook("xt_replace_table", "x_tables", "swap"),
    Hook("do_ipt_set_ctl", "ip_tables", "replace"),
    Hook("do_ip6t_set_ctl", "ip6_tables", "replace"),
)


class PhasesKernel:
    """Maps and programs in the kernel; everything goes away with `close`, or with the process."""

    def __init__(
        self,
        bytecode: Bytecode,
        mechanism: Mechanism,
        netns: int,
        on_record: Callable[[bytes], None],
        host: Host = Host(),
    ) -> None:
        """Make the maps; nothing is attached yet.

        Args:
            bytecode: of `REQUESTS[mechanism]`.
            mechanism: fentry or kprobe.
            netns: inode of the watched network namespace.
            on_record: gets every record from `consume`.
            host: where sysfs is.
        """
        self.mechanism: Final = mechanism
        self._host = host
        self._netns = netns
        self._code = bytecode
        self._maps = {name: Map(spec) for name, spec in bytecode.maps.items()}
        self._fds = {name: each.fd for name, each in self._maps.items()}
        self._attached: dict[Hook, AttachedFunction] = {}
        # Of what is attached: one thread follows the modules while others ask for losses.
        self._lock = Lock()
        # What was missed at functions that are gone: counters never go back.
        self._missed_before = Misses()
        self._ring = RingBuffer(self._fds["events"], on_record)
        self._closed = False

    def attach(self, hook: Hook, function: Function, holes: Holes) -> None:
        """Load and attach the programs of one function.

        Args:
            hook: which programs.
            function: where.
            holes: of `destroy_holes`.

        Raises:
            PrivilegeError, KernelError, UnsupportedError: the kernel refuses.
        """
        fields = dict(zip((Hole.ARG_0, Hole.ARG_1, Hole.ARG_2), function.arguments, strict=False))
        fields[Hole.RESULT] = function.result
        programs = {
            name: link(
                self._code.functions[name],
                map_fds=self._fds,
                kfuncs=kfuncs(self._code.values),
                constants={int(hole): value for hole, value in holes.items()}
                | {Hole.WATCHED_NETNS: self._netns},
                fields={int(hole): offset for hole, offset in fields.items()},
            )
            for name in (f"{hook.stem}_enter", f"{hook.stem}_leave")
        }
        attached = AttachedFunction(self._host, self.mechanism, function, programs)
        with self._lock:
            self._attached[hook] = attached

    def detach(self, hook: Hook) -> None:
        """Let a function go. Idempotent."""
        with self._lock:
            gone = self._attached.pop(hook, None)
            if gone is not None:
                self._missed_before += gone.misses()
                gone.close()

    def consume(self) -> int:
        """Hand waiting records to the receiver; return how many."""
        return 0 if self._closed else self._ring.consume()

    def losses(self) -> Mapping[str, int]:
        """What was not recorded, by reason."""
        lost = dict(zip(LOST_REASONS, _LOST.unpack_from(self._maps["lost"].memory()), strict=True))
        with self._lock:
            missed = sum((each.misses() for each in self._attached.values()), self._missed_before)
        return {**lost, "recursion_miss": missed.recursion, "kprobe_miss": missed.kprobe}

    def close(self) -> None:
        """Detach and free. Idempotent."""
        if self._closed:
            return
        self._closed = True
        # Outer functions first.
        for hook in reversed(HOOKS):
            self.detach(hook)
        self._ring.close()
        for each in self._maps.values():
            each.close()
