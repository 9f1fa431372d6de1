# SPDX-License-Identifier: Apache-2.0
"""The kernel side of the datapath's runs: the maps, and a pair of tracing programs at each program that is measured.

A loaded tracing program is for one target, so each target has two of its own. They go away with their links' descriptors, so
with the process too, and only then can the kernel free a target that was replaced.
"""

import os
import struct
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum, auto
from typing import Final

from kptrace.kernel.attach import attach_tracing
from kptrace.kernel.bytecode import Bytecode, link
from kptrace.kernel.compile import Request
from kptrace.kernel.host import Host
from kptrace.kernel.load import AttachType, ProgramType, load_program
from kptrace.kernel.objects import open_program, program_info
from kptrace.model.errors import KernelError, UnsupportedError
from kptrace.model.netfilter import IpFamily
from kptrace.signals.datapath_cells import FAMILIES, FIRST_HOOK, GROUP_BYTES
from kptrace.signals.datapath_targets import Target
from kptrace.signals.lookup_maps import LookupMaps

REQUEST: Final = Request(
    "program_run.bpf.c",
    facts={
        "KPT_KFUNC_RDONLY_CAST": "?func:bpf_rdonly_cast",
        "KPT_PT_REGS": "struct:pt_regs",
        "KPT_SKB_PROTOCOL": "offset:sk_buff:protocol",
        "KPT_XDP_DATA": "offset:xdp_buff:data",
        # A kernel without BPF for cgroups has no such calls to trace.
        "KPT_CALL_SOCK": "?offset:bpf_sock_addr_kern:sk",
        "KPT_CALL_ADDRESS": "?offset:bpf_sock_addr_kern:uaddr",
        "KPT_SOCK_PROTOCOL": "offset:sock:sk_protocol",
    },
    defines={"KPT_TYPED": 1},
)
#: Maps whose only value the programs address directly, in the order of the C source.
VALUES: Final = {0: "config", 1: "slots", 2: "counts", 3: "seen"}
#: How many targets there is room for.
PAIRS: Final = 128
_SEEN: Final = struct.Struct("=Q")
_NUMBER: Final = struct.Struct("=I")
_BY_PACKET: Final = len(FAMILIES)
_CGROUP_SOCK: Final = 9  # BPF_PROG_TYPE_CGROUP_SOCK


class Hole(IntEnum):
    """What is filled in when a pair is loaded: bpf/program_run.bpf.c has the same order."""

    GROUP = 0
    SERIAL = auto()
    PAIR = auto()
    KIND = auto()
    FAMILY = auto()
    WALK = auto()
    NAMED = auto()


class Kind(IntEnum):
    """What a target is called with, and what its return codes mean."""

    PACKET = 0
    FRAME = auto()
    CALL = auto()


_KINDS: Final[Mapping[int, Kind]] = {
    ProgramType.SCHED_CLS: Kind.PACKET,
    ProgramType.XDP: Kind.FRAME,
    ProgramType.CGROUP_SOCK_ADDR: Kind.CALL,
    _CGROUP_SOCK: Kind.CALL,
}


class ProgramGone(KernelError):
    """A program that was there a moment ago is not any more."""


@dataclass(frozen=True, slots=True)
class _Pair:
    """Attached to one target: its place in `seen`, the hook's name, and each end's program id and link."""

    place: int
    hook: str
    ends: tuple[tuple[int, int], ...]


def holes(target: Target, group: int) -> dict[Hole, int]:
    """What a pair's programs are to be filled with, all but `SERIAL` and `PAIR`. Pure.

    Raises:
        UnsupportedError: programs of this type cannot be measured.
    """
    kind = _KINDS.get(target.program_type)
    if kind is None:
        raise UnsupportedError(f"programs of type {target.program_type} are not measured", remedy="none")
    family = _BY_PACKET
    if kind is Kind.CALL:
        family = FAMILIES.index(target.family or "other")
    named = 0
    if target.hook == FIRST_HOOK and target.program_type == ProgramType.CGROUP_SOCK_ADDR:
        named = {IpFamily.IPV4.value: 4, IpFamily.IPV6.value: 6}.get(target.family, 0)
    # First packets and the rest have divisors of their own, in the order of `struct config`.
    walk = 0 if target.hook == FIRST_HOOK else 1
    return {
        Hole.GROUP: group,
        Hole.KIND: kind,
        Hole.FAMILY: family,
        Hole.WALK: walk,
        Hole.NAMED: named,
    }


class DatapathTracer(LookupMaps):
    """Maps, and a pair of programs at each target."""

    def __init__(self, bytecode: Bytecode, host: Host = Host()) -> None:
        """Make the maps; nothing is attached yet.

        Raises:
            KernelError: the maps were refused.
        """
        super().__init__(bytecode, host)
        kfunc = bytecode.values.get("KPT_KFUNC_RDONLY_CAST")
        self._kfuncs = {0: kfunc} if kfunc is not None else {}
        self._pairs: dict[int, _Pair] = {}
        self._serial = 0
        self._installed: dict[tuple[IpFamily, bytes], int] = {}
        # What was missed at pairs that are gone, by hook: counters never go back.
        self._missed_before: dict[str, int] = {}

    def attach(self, target: Target, group: int) -> None:
        """Attach a pair to a program, its end first: no run is left open for want of one.

        Raises:
            ProgramGone: it is not there any more.
            PrivilegeError, KernelError: the kernel refuses.
            UnsupportedError: programs of this type cannot be measured, or this one has no BTF.
        """
        if not target.function_id:
            raise UnsupportedError(
                f"the program {target.program_id} has no BTF", remedy="load it with its BTF, as Cilium does"
            )
        self._serial = self._serial + 1 & 0x7FFFFFFF
        place = next(n for n in range(PAIRS) if n not in {pair.place for pair in self._pairs.values()})
        filled = {**holes(target, group), Hole.SERIAL: self._serial, Hole.PAIR: place}
        _SEEN.pack_into(self._maps["seen"].memory(), place * _SEEN.size, time.monotonic_ns())
        program = open_program(target.program_id)
        if program is None:
            raise ProgramGone(f"there is no program {target.program_id} any more")
        ends: list[tuple[int, int]] = []
        try:
            for name, when in (("run_leave", AttachType.TRACE_FEXIT), ("run_enter", AttachType.TRACE_FENTRY)):
                ends.append(self._end(name, when, target.function_id, program, filled))
        except BaseException:
            _close(ends)
            raise
        finally:
            os.close(program)  # the links hold it
        self._pairs[target.program_id] = _Pair(place, target.hook, tuple(ends))

    def _end(
        self, name: str, when: AttachType, function_id: int, target: int, filled: Mapping[Hole, int]
    ) -> tuple[int, int]:
        code = link(
            self._code.functions[name],
            map_fds=self._fds,
            kfuncs=self._kfuncs,
            values=VALUES,
            constants=dict(filled.items()),
        )
        program = load_program(
            name, code, ProgramType.TRACING, when, attach_btf_id=function_id, attach_fd=target
        )
        try:
            return program_info(program).id, attach_tracing(program)
        finally:
            os.close(program)  # the link holds it

    def release(self, program_id: int) -> None:
        """Let a program go, its entry first. Idempotent."""
        pair = self._pairs.pop(program_id, None)
        if pair is not None:
            self._missed_before[pair.hook] = self._missed_before.get(pair.hook, 0) + _missed(pair)
            _close(reversed(pair.ends))

    def idle(self, seconds: float) -> frozenset[int]:
        """Targets of which no run was sampled in the last seconds, nor since they were attached to."""
        memory, before = self._maps["seen"].memory(), time.monotonic_ns() - int(seconds * 1e9)
        return frozenset(
            number
            for number, pair in self._pairs.items()
            if _SEEN.unpack_from(memory, pair.place * _SEEN.size)[0] < before
        )

    def misses(self) -> Mapping[str, int]:
        """By hook, what the kernel counted of programs that it did not run; to be asked where pairs are attached."""
        totals = dict(self._missed_before)
        for pair in self._pairs.values():
            totals[pair.hook] = totals.get(pair.hook, 0) + _missed(pair)
        return totals

    def clear(self, group: int) -> None:
        """Forget what a group counted, which nobody was told yet."""
        self._maps["cells"].memory()[group * GROUP_BYTES : (group + 1) * GROUP_BYTES] = bytes(GROUP_BYTES)

    def set_services(self, wanted: Mapping[tuple[IpFamily, bytes], int]) -> None:
        """Make the maps of Service addresses hold exactly this: address key to service number."""
        for family, key in self._installed.keys() - wanted.keys():
            self._maps[_SERVICES[family]].delete(key)
            del self._installed[family, key]
        for (family, key), number in wanted.items():
            if self._installed.get((family, key)) != number:
                self._maps[_SERVICES[family]].update(key, _NUMBER.pack(number))
                self._installed[family, key] = number

    def close(self) -> None:
        """Detach and free. Idempotent."""
        for number in tuple(self._pairs):
            self.release(number)
        super().close()


_SERVICES: Final = {IpFamily.IPV4: "services4", IpFamily.IPV6: "services6"}


def _missed(pair: _Pair) -> int:
    total = 0
    for program_id, _ in pair.ends:
        fd = open_program(program_id)
        if fd is not None:
            try:
                total += program_info(fd).recursion_misses
            finally:
                os.close(fd)
    return total


def _close(ends: Iterable[tuple[int, int]]) -> None:
    for _, attachment in ends:
        os.close(attachment)
