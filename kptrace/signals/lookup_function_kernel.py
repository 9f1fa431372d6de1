# SPDX-License-Identifier: Apache-2.0
"""The kernel side of look-ups by function: the maps, and a pair of programs at the two ends of each function.

fentry and fexit are links to the function's trampoline and pin its module; kprobe and kretprobe are perf events (or BPF
links to them) and do not. Either goes away with its descriptor, so with the process too.
"""

import os
import struct
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

from kptrace.kernel.attach import attach_kprobe, attach_tracing, kprobe_pmu
from kptrace.kernel.bytecode import Bytecode, link
from kptrace.kernel.compile import Request
from kptrace.kernel.host import Host
from kptrace.kernel.info import btf_object, kprobe_missed, recursion_misses
from kptrace.kernel.load import AttachType, ProgramType, load_program
from kptrace.model.errors import KernelError
from kptrace.signals.lookup_function_layout import Function, Hole, Holes
from kptrace.signals.lookup_function_places import LEARNT, NAME_BYTES, Place
from kptrace.signals.lookup_maps import LookupMaps

Mechanism = Literal["fentry", "kprobe"]

#: What the daemon compiles for each mechanism: nothing of it depends on a module that may come later.
REQUESTS: Final[Mapping[Mechanism, Request]] = MappingProxyType(
    {
        "fentry": Request(
            "lookup_function.bpf.c",
            facts={"KPT_KFUNC_RDONLY_CAST": "?func:bpf_rdonly_cast", "KPT_PT_REGS": "struct:pt_regs"},
            defines={"KPT_TYPED": 1},
        ),
        "kprobe": Request("lookup_function.bpf.c"),
    }
)
#: Maps whose only value the programs address directly, in the order of the C source.
VALUES: Final = {0: "config", 1: "slots", 2: "counts", 3: "learnt"}
_KEY: Final = struct.Struct("=I")


@dataclass(frozen=True, slots=True)
class Target:
    """A function as it is on this kernel.

    Attributes:
        function: which.
        holes: what its programs are to be filled with.
        btf_id: its number in the BTF that describes it, 0 where it has none.
        module: the loaded module's number, 0 where the function is built in.
    """

    function: Function
    holes: Holes
    btf_id: int
    module: int


@dataclass(slots=True)
class Misses:
    """What the kernel itself counted as missed, at one end of one function.

    Attributes:
        recursion: programs not run since the CPU was in one already.
        kprobe: kprobes passed by; None where the kernel does not tell.
    """

    recursion: int = 0
    kprobe: int | None = None


@dataclass(frozen=True, slots=True)
class _End:
    program: int
    attachment: int


class FunctionKernel(LookupMaps):
    """Maps and programs of one mechanism."""

    def __init__(self, bytecode: Bytecode, mechanism: Mechanism, netns: int, host: Host = Host()) -> None:
        """Make the maps; nothing is attached yet. `netns` is the inode of the watched network namespace."""
        super().__init__(bytecode, host)
        self.mechanism: Final = mechanism
        self._host = host
        self._netns = netns
        kfunc = bytecode.values.get("KPT_KFUNC_RDONLY_CAST")
        self._kfuncs = {0: kfunc} if kfunc is not None else {}
        self._ends: dict[str, tuple[_End, ...]] = {}
        # Scrapes ask in other threads for what was missed: never of an end that is being closed.
        self._lock = threading.Lock()
        # What was missed at ends that are gone: counters never go back.
        self._missed_before = Misses()
        self._places: tuple[tuple[int, ...], Mapping[int, Place]] = ((), {})

    def attach(self, target: Target) -> None:
        """Load and attach both ends of a function, its return first: no entry is left without one.

        Raises:
            PrivilegeError, KernelError, UnsupportedError: the kernel refuses.
        """
        function = target.function
        leave = self._end(target, function.leave, at_return=True)
        try:
            enter = self._end(target, function.enter, at_return=False)
        except BaseException:
            _close(leave)
            raise
        with self._lock:
            self._ends[function.name] = (enter, leave)

    def detach(self, function: Function) -> None:
        """Let a function go, its entry first. Idempotent."""
        with self._lock:
            ends = self._ends.pop(function.name, ())
            if ends:
                self._missed_before = _sum([self._missed_before, *map(_misses, ends)])
            for end in ends:
                _close(end)

    def _end(self, target: Target, name: str, *, at_return: bool) -> _End:
        holes = {**target.holes, Hole.HOST_NETNS: self._netns}
        code = link(
            self._code.functions[name],
            map_fds=self._fds,
            kfuncs=self._kfuncs,
            values=VALUES,
            constants={hole: value & 0xFFFFFFFF for hole, value in holes.items()},
            fields=dict(holes.items()),
        )
        if self.mechanism == "kprobe":
            program = load_program(name, code, ProgramType.KPROBE)
        else:
            program = self._load_tracing(target, name, code, at_return=at_return)
        try:
            if self.mechanism == "fentry":
                attachment = attach_tracing(program)
            else:
                pmu = kprobe_pmu(self._host)
                attachment = attach_kprobe(program, pmu, target.function.name, at_return=at_return)
        except BaseException:
            os.close(program)
            raise
        return _End(program, attachment)

    def _load_tracing(self, target: Target, name: str, code: bytes, *, at_return: bool) -> int:
        module = btf_object(target.function.module) if target.module else 0
        if module is None:
            raise KernelError(f"the kernel has no BTF object of the module {target.function.module}")
        try:
            return load_program(
                name,
                code,
                ProgramType.TRACING,
                AttachType.TRACE_FEXIT if at_return else AttachType.TRACE_FENTRY,
                attach_btf_id=target.btf_id,
                attach_fd=module,
            )
        finally:
            if module:
                os.close(module)

    def places(self) -> Mapping[int, Place]:
        """What was walked so far, by number; safe on any thread until `close`."""
        learnt = LEARNT.unpack_from(self.memory("learnt"))
        if learnt != self._places[0]:
            places = self._maps["places"]
            found = {}
            for key in list(places.keys()):
                value = places.lookup(key)
                if value is not None:
                    found[_KEY.unpack(key)[0]] = Place.decode(value[:NAME_BYTES])
            self._places = (learnt, MappingProxyType(found))
        return self._places[1]

    def folded(self) -> int:
        """How often a chain got no number of its own."""
        return int(LEARNT.unpack_from(self.memory("learnt"))[-1])

    def misses(self) -> Misses:
        """What the kernel counted as missed, from the start."""
        with self._lock:
            every = [_misses(end) for ends in self._ends.values() for end in ends]
            return _sum([self._missed_before, *every])

    def close(self) -> None:
        """Detach and free. Idempotent."""
        with self._lock:
            for ends in self._ends.values():
                for end in ends:
                    _close(end)
            self._ends.clear()
        super().close()


def _misses(end: _End) -> Misses:
    return Misses(recursion_misses(end.program) or 0, kprobe_missed(end.attachment))


def _sum(every: list[Misses]) -> Misses:
    known = [each.kprobe for each in every if each.kprobe is not None]
    return Misses(sum(each.recursion for each in every), sum(known) if known else None)


def _close(end: _End) -> None:
    os.close(end.attachment)
    os.close(end.program)
