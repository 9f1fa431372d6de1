# SPDX-License-Identifier: Apache-2.0
"""Kernel functions with programs at both ends: fentry and fexit, or kprobe and kretprobe.

fentry and fexit are links to the function's trampoline and pin its module; kprobes are perf events, or BPF links to them,
and do not. Either goes away with its descriptor, so with the process too.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from kptrace.kernel.attach import attach_kprobe, attach_tracing, kprobe_pmu
from kptrace.kernel.btf import Btf
from kptrace.kernel.host import Host
from kptrace.kernel.info import btf_object, kprobe_missed, recursion_misses
from kptrace.kernel.load import AttachType, ProgramType, load_program
from kptrace.kernel.registers import Registers
from kptrace.model.errors import KernelError

Mechanism = Literal["fentry", "kprobe"]
MECHANISMS: Final[tuple[Mechanism, ...]] = ("fentry", "kprobe")


@dataclass(frozen=True, slots=True)
class Function:
    """A kernel function as it is here.

    Attributes:
        name: as the kernel calls it.
        module: the module that it is in, empty where it is built in.
        btf_id: its number in the BTF that describes it; 0 where that is not needed.
        arguments: offsets of its first arguments in a program's context, at the entry.
        result: offset of what it returns, at the return.
    """

    name: str
    module: str
    btf_id: int
    arguments: tuple[int, ...]
    result: int


def describe(btf: Btf, name: str, module: str, registers: Registers | None) -> Function:
    """Find a function's number and arguments.

    Args:
        btf: of the module that has the function, or of the kernel.
        name: the function.
        module: its module, empty where it is built in.
        registers: for kprobes, which find a function by its name; None for fentry, whose context is the arguments.

    Raises:
        BtfMissing: fentry cannot find it.
    """
    if registers:
        return Function(name, module, 0, registers.arguments, registers.result)
    offsets = [0]
    for size in btf.function_sizes(name):
        # Eight bytes for each argument, and as many of them as a structure by value needs.
        offsets.append(offsets[-1] + max(1, -(-size // 8)) * 8)
    return Function(name, module, btf.func_id(name), tuple(offsets[:-1]), offsets[-1])


@dataclass(frozen=True, slots=True)
class Misses:
    """What the kernel itself counted as missed.

    Attributes:
        recursion: programs not run since their CPU was in one already.
        kprobe: kprobes passed by, as far as the kernel tells.
    """

    recursion: int = 0
    kprobe: int = 0

    def __add__(self, other: "Misses") -> "Misses":
        return Misses(self.recursion + other.recursion, self.kprobe + other.kprobe)


class AttachedFunction:
    """One function with its two programs attached, until `close`."""

    def __init__(
        self, host: Host, mechanism: Mechanism, function: Function, programs: Mapping[str, bytes]
    ) -> None:
        """Load and attach both, the return's first: no entry is left without one.

        Args:
            host: where sysfs is.
            mechanism: how.
            function: where.
            programs: name and code of the program at the entry, then of the one at the return.

        Raises:
            PrivilegeError, KernelError, UnsupportedError: the kernel refuses.
        """
        self.function = function
        self._programs: list[int] = []
        self._attachments: list[int] = []
        try:
            ends = list(zip((False, True), programs.items(), strict=True))
            for at_return, (name, code) in reversed(ends):
                self._programs.append(_load(mechanism, function, name, code, at_return=at_return))
                if mechanism == "fentry":
                    attachment = attach_tracing(self._programs[-1])
                else:
                    pmu = kprobe_pmu(host)
                    attachment = attach_kprobe(self._programs[-1], pmu, function.name, at_return=at_return)
                self._attachments.append(attachment)
        except BaseException:
            self.close()
            raise

    def misses(self) -> Misses:
        """What was missed since it is attached."""
        return Misses(
            sum(recursion_misses(program) or 0 for program in self._programs),
            sum(kprobe_missed(attachment) or 0 for attachment in self._attachments),
        )

    def close(self) -> None:
        """Detach, the entry first. Idempotent."""
        while self._attachments:
            os.close(self._attachments.pop())
        while self._programs:
            os.close(self._programs.pop())


def _load(mechanism: Mechanism, function: Function, name: str, code: bytes, *, at_return: bool) -> int:
    if mechanism == "kprobe":
        return load_program(name, code, ProgramType.KPROBE)
    module = btf_object(function.module) if function.module else 0
    if module is None:
        raise KernelError(f"the kernel has no BTF object of the module {function.module}")
    try:
        return load_program(
            name,
            code,
            ProgramType.TRACING,
            AttachType.TRACE_FEXIT if at_return else AttachType.TRACE_FENTRY,
            attach_btf_id=function.btf_id,
            attach_fd=module,
        )
    finally:
        if module:
            os.close(module)
