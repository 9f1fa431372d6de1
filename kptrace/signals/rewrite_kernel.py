# SPDX-License-Identifier: Apache-2.0
"""The kernel side of the rewrite signal: its maps, its syscall tracepoints, and the ring that records come through."""

import errno
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from kptrace.kernel.bytecode import Bytecode
from kptrace.kernel.compile import Request
from kptrace.model.errors import KernelError
from kptrace.signals import rewrite_requests_records as requests
from kptrace.signals.task_facts import TASK_FACTS
from kptrace.signals.tracepoints import TracepointPrograms

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

#: By these a writer reads the answers to what it asks for itself; see `attach_receives`.
_RECEIVES = ("recvmsg", "recvfrom")

#: `struct started` in rewrite.h.
_STARTED = struct.Struct("=5Q6I")
_KEY = struct.Struct("=Q")
_TGID = struct.Struct("=I")
LOST_REASONS = ("ring_full", "running_full", "unreadable", "requests_full")
_UNSURE = 1


@dataclass(frozen=True, slots=True)
class Running:
    """A transaction whose syscall has not returned yet."""

    tgid: int
    tid: int
    begin_ns: int
    kind: int
    netns: int


class RewriteKernel(TracepointPrograms):
    """See `TracepointPrograms`."""

    def __init__(self, bytecode: Bytecode, on_record: Callable[[bytes], None]) -> None:
        """Make the maps; nothing is attached yet. `on_record` gets every record from `consume`."""
        super().__init__(bytecode, "events", LOST_REASONS, on_record)
        #: Whether records carry the ruleset's generation itself, not only whether it moved.
        self.knows_generation = "KPT_NET_BASE_SEQ" in bytecode.values
        self._sys_root = Path("/sys")

    def attach(self, sys_root: Path = Path("/sys")) -> None:
        """Load and attach all programs.

        Raises:
            PrivilegeError, KernelError: the kernel refuses them.
            UnsupportedError: it has no syscall tracepoints.
        """
        self._sys_root = sys_root
        with self.attaching(sys_root) as attaching:
            # Exits first: no entry is ever left without one.
            for call in _SYSCALLS:
                attaching.syscall("exit_rewrite", f"sys_exit_{call}")
            for call, program in _SYSCALLS.items():
                attaching.syscall(program, f"sys_enter_{call}")

    def running(self) -> Iterator[Running]:
        """Transactions that are under way now. Safe on any thread until `close`."""
        running = self.maps["running"]
        for key in running.keys():  # noqa: SIM118  (a BPF map is no dict)
            value = running.lookup(key)
            if value is not None:
                begin, _, _, _, _, kind, flags, _, _, netns, _ = _STARTED.unpack(value)
                if not flags & _UNSURE:
                    identity = _KEY.unpack(key)[0]
                    yield Running(identity >> 32, identity & 0xFFFFFFFF, begin, kind, netns)

    def forget(self, run: Running) -> None:
        """Remove a transaction whose thread is gone."""
        self.maps["running"].delete(_KEY.pack(run.tgid << 32 | run.tid))

    def take_askers(self) -> Iterator[requests.Requests]:
        """The first requests of processes that are not followed, each once."""
        askers = self.maps["askers"]
        for key in list(askers.keys()):
            first, asker = askers.lookup(key), requests.decode_key(key)
            if first is not None and asker is not None and askers.delete(key):
                begin = requests.FIRST.unpack(first)[0]
                yield requests.Requests(asker, begin, begin)

    def spans(self) -> Iterator[requests.Requests]:
        """The last requests of those that are."""
        spans = self.maps["spans"]
        for key in spans.keys():  # noqa: SIM118  (a BPF map is no dict)
            value = spans.lookup(key)
            if value is not None and (found := requests.decode_span(key, value)) is not None:
                yield found

    def follow(self, tgid: int) -> bool:
        """Keep spans of a process; whether there was room."""
        try:
            self.maps["followed"].update(_TGID.pack(tgid), _TGID.pack(1))
        except KernelError as error:
            if error.errno != errno.E2BIG:
                raise
            return False
        return True

    def unfollow(self, tgid: int) -> None:
        """Forget a process."""
        self.maps["followed"].delete(_TGID.pack(tgid))
        spans = self.maps["spans"]
        for key in [each for each in spans.keys() if each.startswith(_TGID.pack(tgid))]:  # noqa: SIM118
            spans.delete(key)

    def attach_receives(self) -> None:
        """Trace the receives of the node, which costs each of them: only where somebody is followed.

        Raises:
            PrivilegeError, KernelError, UnsupportedError: as `attach` has it.
        """
        with self.attaching(self._sys_root) as attaching:
            for call in _RECEIVES:
                attaching.syscall("enter_receive", f"sys_enter_{call}")
