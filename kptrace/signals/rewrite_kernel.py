# SPDX-License-Identifier: Apache-2.0
"""The kernel side of the rewrite signal: its maps, its syscall tracepoints, and the ring that records come through."""

import os
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from kptrace.kernel.attach import attach_tracepoint
from kptrace.kernel.bytecode import Bytecode, link
from kptrace.kernel.compile import Request
from kptrace.kernel.events import RingBuffer
from kptrace.kernel.load import ProgramType, load_program
from kptrace.kernel.maps import Map
from kptrace.kernel.tracefs import Tracefs
from kptrace.signals.task_facts import TASK_FACTS, kfuncs

REQUEST = Request(
    "rewrite.bpf.c",
    facts={
        **TASK_FACTS,
        "KPT_NET_BASE_SEQ": "?offset:net:nft.base_seq",
        "KPT_NET_GENCURSOR": "?offset:net:nft.gencursor",
        "KPT_SOCK": "struct:sock",
        "KPT_SOCK_FAMILY": "offset:sock:__sk_common.skc_family",
        "KPT_SOCK_NET": "offset:sock:__sk_common.skc_net.net",
        "KPT_SOCK_PROTOCOL": "offset:sock:sk_protocol",
        "KPT_SOCK_QUEUE_LENGTH": "offset:sock:sk_receive_queue.qlen",
        "KPT_SOCK_QUEUE_LAST": "offset:sock:sk_receive_queue.prev",
        "KPT_SKB": "struct:sk_buff",
        "KPT_SKB_PREV": "offset:sk_buff:prev",
        "KPT_SKB_DATA": "offset:sk_buff:data",
    },
)

#: Syscall to the program at its entry; all share the one at their exits.
_SYSCALLS = {
    "sendmsg": "enter_sendmsg",
    "sendmmsg": "enter_sendmmsg",
    "sendto": "enter_flat",
    "write": "enter_flat",
    "writev": "enter_writev",
    "setsockopt": "enter_setsockopt",
}

#: `struct started` in rewrite.h.
_STARTED = struct.Struct("=5Q6I")
_KEY = struct.Struct("=Q")
LOST_REASONS = ("ring_full", "running_full", "unreadable")
_LOST = struct.Struct(f"={len(LOST_REASONS)}Q")
_UNSURE = 1


@dataclass(frozen=True, slots=True)
class Running:
    """A transaction whose syscall has not returned yet."""

    tgid: int
    tid: int
    begin_ns: int
    kind: int
    netns: int


class RewriteKernel:
    """Maps and programs in the kernel; everything goes away with `close`, or with the process."""

    def __init__(self, bytecode: Bytecode, on_record: Callable[[bytes], None]) -> None:
        """Make the maps; nothing is attached yet. `on_record` gets every record from `consume`."""
        self._code = bytecode
        self._maps = {name: Map(spec) for name, spec in bytecode.maps.items()}
        self._fds = {name: each.fd for name, each in self._maps.items()}
        self._attached: list[int] = []
        self._ring = RingBuffer(self._fds["events"], on_record)
        self._closed = False

    @property
    def knows_generation(self) -> bool:
        """Whether records carry the ruleset's generation itself, not only whether it moved."""
        return "KPT_NET_BASE_SEQ" in self._code.values

    @property
    def fd(self) -> int:
        """Becomes readable when a rewrite waits."""
        return self._ring.fd

    def attach(self, sys_root: Path = Path("/sys")) -> None:
        """Load and attach all programs.

        Raises:
            PrivilegeError, KernelError: the kernel refuses them.
            UnsupportedError: it has no syscall tracepoints.
        """
        tracefs = Tracefs(sys_root)
        programs: dict[str, int] = {}
        try:
            for name in ("exit_rewrite", *dict.fromkeys(_SYSCALLS.values())):
                programs[name] = self._load(name, ProgramType.TRACEPOINT)
            # Exits first: no entry is ever left without one.
            for call in _SYSCALLS:
                self._hook(programs["exit_rewrite"], tracefs, f"sys_exit_{call}")
            for call, program in _SYSCALLS.items():
                self._hook(programs[program], tracefs, f"sys_enter_{call}")
        finally:
            tracefs.close()
            for fd in programs.values():
                os.close(fd)

    def _load(self, name: str, kind: ProgramType) -> int:
        code = link(self._code.functions[name], map_fds=self._fds, kfuncs=kfuncs(self._code.values))
        return load_program(name, code, kind)

    def _hook(self, program: int, tracefs: Tracefs, name: str) -> None:
        self._attached.append(attach_tracepoint(program, tracefs, "syscalls", name))

    def consume(self) -> int:
        """Hand waiting records to the receiver; return how many."""
        return 0 if self._closed else self._ring.consume()

    def running(self) -> Iterator[Running]:
        """Transactions that are under way now. Safe on any thread until `close`."""
        running = self._maps["running"]
        for key in running.keys():  # noqa: SIM118  (a BPF map is no dict)
            value = running.lookup(key)
            if value is not None:
                begin, _, _, _, _, kind, flags, _, _, netns, _ = _STARTED.unpack(value)
                if not flags & _UNSURE:
                    identity = _KEY.unpack(key)[0]
                    yield Running(identity >> 32, identity & 0xFFFFFFFF, begin, kind, netns)

    def forget(self, run: Running) -> None:
        """Remove a transaction whose thread is gone."""
        self._maps["running"].delete(_KEY.pack(run.tgid << 32 | run.tid))

    def losses(self) -> Mapping[str, int]:
        """Records that never came, by reason."""
        return dict(zip(LOST_REASONS, _LOST.unpack_from(self._maps["lost"].memory()), strict=True))

    def close(self) -> None:
        """Detach and free. Idempotent."""
        if self._closed:
            return
        self._closed = True
        while self._attached:
            os.close(self._attached.pop())
        self._ring.close()
        for each in self._maps.values():
            each.close()
