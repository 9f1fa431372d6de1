# SPDX-License-Identifier: Apache-2.0
"""Where a function's arguments are at its entry, and what is still so at its return, as a kprobe sees it. Pure.

Offsets are those in `struct pt_regs` (arm64: `struct user_pt_regs`), the context of kprobe programs: a part of what user
space is promised, so they are no question to BTF.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from kptrace.model.errors import UnsupportedError


@dataclass(frozen=True, slots=True)
class Registers:
    """Offsets in bytes.

    Attributes:
        arguments: of the first integer or pointer arguments.
        result: of what the function returns.
        stack: of the stack pointer.
        saved: of registers that a function gives back to its caller as it found them.
        return_pops: how much higher the stack pointer is at the return than at the entry.
    """

    arguments: tuple[int, ...]
    result: int
    stack: int
    saved: tuple[int, int, int, int]
    return_pops: int


#: x86-64: rdi, rsi, rdx, rcx; rax; rsp; rbx, rbp, r12, r13. The call pushed the return address, which the return pops: a
#: kretprobe sees the stack pointer 8 bytes above the one that the kprobe saw.
#: arm64: x0 to x3; x0; sp; x19 to x22. The return address is in x30: the stack pointer is the same at both ends.
_BY_MACHINE: Final[Mapping[str, Registers]] = MappingProxyType(
    {
        "x86_64": Registers((112, 104, 96, 88), 80, 152, (40, 32, 24, 16), 8),
        "aarch64": Registers((0, 8, 16, 24), 0, 248, (152, 160, 168, 176), 0),
    }
)


def registers(machine: str) -> Registers:
    """The layout for a machine as `uname -m` calls it.

    Raises:
        UnsupportedError: it is not known.
    """
    try:
        return _BY_MACHINE[machine]
    except KeyError:
        raise UnsupportedError(
            f"no register layout for {machine}", remedy=f"run on {' or '.join(sorted(_BY_MACHINE))}"
        ) from None
