# SPDX-License-Identifier: Apache-2.0
"""The little BTF that a program needs so that tracing programs can name it as their target.

A tracing program is attached to a function of another program by that function's type id, so the target needs BTF with its
function, whose one parameter points to the structure that is the context of its kind.
"""

import ctypes
import struct
from dataclasses import dataclass
from typing import Final

from kptrace.kernel.btf_format import MAGIC, VERSION, Kind
from kptrace.kernel.load import ProgramType
from kptrace.kernel.syscall import Command, bpf
from kptrace.model.errors import KernelError

_LOG_BYTES: Final = 1 << 16
_SIGNED: Final = 1 << 24  # BTF_INT_SIGNED, where an integer has its encoding
_GLOBAL: Final = 1  # BTF_FUNC_GLOBAL: of a static function the kernel does not believe the prototype
# Ids in the order of writing.
_INT, _STRUCT, _POINTER, _PROTOTYPE, _FUNCTION = 1, 2, 3, 4, 5

#: The structure that the context of a kind of program points to, by its name for user space.
CONTEXTS: Final = {
    ProgramType.SCHED_CLS: "__sk_buff",
    ProgramType.XDP: "xdp_md",
    ProgramType.CGROUP_SOCK_ADDR: "bpf_sock_addr",
}


@dataclass(frozen=True, slots=True)
class ProgramBtf:
    """BTF of a program that is one function.

    Attributes:
        blob: for `load_btf`.
        function: type id of the function in it.
    """

    blob: bytes
    function: int

    @property
    def function_info(self) -> bytes:
        """The argument of that name of `load_program`: the function begins at instruction 0."""
        return struct.pack("=II", 0, self.function)


def program_btf(name: str, kind: ProgramType) -> ProgramBtf:
    """BTF for `int name(struct CONTEXT *ctx)`, with the context of this kind of program (one of `CONTEXTS`)."""
    # Each type is its name's offset, its kind and details, and the type or size that belongs to it.
    strings = b"\0"
    types = b""

    def string(text: str) -> int:
        nonlocal strings
        strings += text.encode() + b"\0"
        return len(strings) - len(text.encode()) - 1

    def add(kind: Kind, name: int, details: int, value: int, *tail: int) -> None:
        nonlocal types
        types += struct.pack(f"={3 + len(tail)}I", name, kind << 24 | details, value, *tail)

    # The kernel knows the context by the structure's name, and puts its own in that place: no member is needed.
    add(Kind.INT, string("int"), 0, 4, _SIGNED | 32)
    add(Kind.STRUCT, string(CONTEXTS[kind]), 0, 0)
    add(Kind.PTR, 0, 0, _STRUCT)
    add(Kind.FUNC_PROTO, 0, 1, _INT, string("ctx"), _POINTER)
    add(Kind.FUNC, string(name), _GLOBAL, _PROTOTYPE)
    header = struct.pack("=HBBIIIII", MAGIC, VERSION, 0, 24, 0, len(types), len(types), len(strings))
    return ProgramBtf(header + types + strings, _FUNCTION)


def load_btf(blob: bytes) -> int:
    """Hand BTF to the kernel and return its descriptor; a program that was loaded with it keeps it alive.

    Raises:
        KernelError: the kernel refused it; the message has the end of its reasons.
    """
    data = ctypes.create_string_buffer(blob, len(blob))
    log = ctypes.create_string_buffer(_LOG_BYTES)
    try:
        return bpf(
            Command.BTF_LOAD,
            struct.pack("=QQIII4x", ctypes.addressof(data), ctypes.addressof(log), len(blob), len(log), 1),
        )
    except KernelError as error:
        lines = log.value.decode(errors="replace").strip().splitlines()[-4:]
        raise KernelError(
            f"the kernel refused BTF: {error}: {' | '.join(lines)}", errno=error.errno
        ) from error
