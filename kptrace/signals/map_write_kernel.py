# SPDX-License-Identifier: Apache-2.0
"""The kernel side of map writes: its maps, the tracepoints of bpf(2), and the ring that records come through."""

import struct
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kptrace.kernel.bytecode import Bytecode
from kptrace.kernel.compile import Request
from kptrace.kernel.host import Host
from kptrace.kernel.maps import MapType, per_cpu_stride
from kptrace.model.errors import UnsupportedError
from kptrace.signals.map_write_records import ENTRY_BYTES, WatchedMap
from kptrace.signals.task_facts import TASK_FACTS
from kptrace.signals.tracepoints import TracepointPrograms

REQUEST = Request(
    "map_write.bpf.c",
    facts={
        **TASK_FACTS,
        "KPT_MAP": "struct:bpf_map",
        "KPT_MAP_ID": "offset:bpf_map:id",
        "KPT_MAP_TYPE": "offset:bpf_map:map_type",
        "KPT_MAP_KEY_SIZE": "offset:bpf_map:key_size",
        "KPT_MAP_VALUE_SIZE": "offset:bpf_map:value_size",
        "KPT_MAP_NAME": "offset:bpf_map:name",
        "KPT_PROGRAM": "struct:bpf_prog",
        "KPT_PROGRAM_EXTRA": "offset:bpf_prog:aux",
        "KPT_EXTRA": "struct:bpf_prog_aux",
        "KPT_EXTRA_ID": "offset:bpf_prog_aux:id",
        "KPT_EXTRA_NAME": "offset:bpf_prog_aux:name",
    },
)

LOST_REASONS: Final = ("ring_full", "running_full", "unreadable")
#: As many maps as the kernel side can tell apart, and as many processes: MAX_WATCHED and MAX_AGENTS in map_write.bpf.c.
MAX_WATCHED: Final = 1024
MAX_AGENTS: Final = 63  # and this process

_WATCHED: Final = struct.Struct("=6I")
_NUMBER: Final = struct.Struct("=I")
_THREAD: Final = struct.Struct("=Q")
#: `struct write_started` in map_write.h begins with these: begin_ns, attributes.
_STARTED: Final = struct.Struct("=2Q")
_ROLE_AGENT, _ROLE_SELF = 1, 2
_PER_CPU: Final = (MapType.PERCPU_HASH, MapType.PERCPU_ARRAY, MapType.LRU_PERCPU_HASH)


@dataclass(frozen=True, slots=True)
class Running:
    """A call that has not returned yet.

    Attributes:
        tgid, tid: process and thread, in the initial PID namespace.
        begin_ns: CLOCK_MONOTONIC of its entry.
        attributes: its second argument.
    """

    tgid: int
    tid: int
    begin_ns: int
    attributes: int


def own_number(proc: Path) -> int:
    """This process's id in the PID namespace of a procfs, the host's as the kernel side counts, wherever this one is.

    Raises:
        UnsupportedError: it is no procfs, or one of a namespace that this process is not in.
    """
    try:
        return int((proc / "self").readlink().name)
    except (OSError, ValueError) as error:
        raise UnsupportedError(
            f"{proc}/self does not tell this process's id: {error}", remedy="mount the host's procfs there"
        ) from error


def still_inside(proc: Path, run: Running) -> bool:
    """Whether the thread may be in that call, as procfs tells; it does not of a thread that is on a CPU.

    The kernel runs no program at a return on a CPU where another task was preempted inside bpf(2).
    """
    try:
        words = (proc / str(run.tgid) / "task" / str(run.tid) / "syscall").read_text(encoding="ascii").split()
    except (FileNotFoundError, ProcessLookupError):
        return False
    except OSError:
        return True
    # Its number, then its arguments.
    return words[:1] == ["running"] or (len(words) > 2 and int(words[2], 16) == run.attributes)


class MapWriteKernel(TracepointPrograms):
    """See `TracepointPrograms`."""

    def __init__(self, bytecode: Bytecode, on_record: Callable[[bytes], None], host: Host = Host()) -> None:
        """Make the maps; nothing is attached yet. `on_record` gets every record from `consume`.

        Raises:
            UnsupportedError: procfs does not tell which process this is.
        """
        self._self = own_number(host.proc)
        super().__init__(bytecode, "events", LOST_REASONS, on_record)
        self._cpus = host.possible_cpus()
        self._watched: dict[int, bytes] = {}
        self._agents: frozenset[int] = frozenset()
        self.maps["agents"].update(_NUMBER.pack(self._self), _NUMBER.pack(_ROLE_SELF))

    def attach(self, sys_root: Path = Path("/sys")) -> None:
        """Load and attach all programs.

        Raises:
            PrivilegeError, KernelError: the kernel refuses them.
            UnsupportedError: it has no syscall tracepoints.
        """
        with self.attaching(sys_root) as attaching:
            # The exit first: no entry is ever left without one.
            attaching.syscall("exit_bpf", "sys_exit_bpf")
            attaching.syscall("enter_bpf", "sys_enter_bpf")

    def watch(self, maps: Mapping[int, WatchedMap]) -> int:
        """Tell writes to the maps of these ids, and to no others; returns how many are too many to be watched."""
        chosen = dict(sorted(maps.items())[:MAX_WATCHED])
        values = {number: self._value(each) for number, each in chosen.items()}
        table = self.maps["watched"]
        for gone in self._watched.keys() - values.keys():
            table.delete(_NUMBER.pack(gone))
        for number, value in values.items():
            if self._watched.get(number) != value:
                table.update(_NUMBER.pack(number), value)
        self._watched = values
        return len(maps) - len(chosen)

    def _value(self, map_: WatchedMap) -> bytes:
        per_cpu = map_.type in _PER_CPU
        size = per_cpu_stride(map_.value_size) * self._cpus if per_cpu else map_.value_size
        most = ENTRY_BYTES // max(map_.key_size + size, 1)
        return _WATCHED.pack(map_.number, map_.type, map_.key_size, map_.value_size, size, most)

    def agents(self, tgids: Collection[int]) -> int:
        """Tell what these processes do to programs; returns how many of them are too many."""
        wanted = sorted(set(tgids) - {self._self})
        chosen = frozenset(wanted[:MAX_AGENTS])
        table = self.maps["agents"]
        for gone in self._agents - chosen:
            table.delete(_NUMBER.pack(gone))
        for tgid in chosen - self._agents:
            table.update(_NUMBER.pack(tgid), _NUMBER.pack(_ROLE_AGENT))
        self._agents = chosen
        return len(wanted) - len(chosen)

    def running(self) -> Iterator[Running]:
        """Calls that are under way now."""
        running = self.maps["running"]
        for key in running.keys():  # noqa: SIM118  (a BPF map is no dict)
            value = running.lookup(key)
            if value is not None:
                identity = _THREAD.unpack(key)[0]
                yield Running(identity >> 32, identity & 0xFFFFFFFF, *_STARTED.unpack_from(value))

    def forget(self, run: Running) -> None:
        """Remove a call whose thread is elsewhere."""
        self.maps["running"].delete(_THREAD.pack(run.tgid << 32 | run.tid))
