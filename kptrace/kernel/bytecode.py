# SPDX-License-Identifier: Apache-2.0
"""Compiled programs as plain data, and the pure rewriting that makes them loadable on this kernel.

The compiler leaves holes: references to maps (by name) and to the value of a map that has only one (by placeholder
immediate, since BCC cannot say it), calls of kernel functions (by placeholder helper number, since BCC cannot call
kfuncs), constants that differ per instance (by placeholder immediate), and loads at offsets that are not known when the
compiler runs (by placeholder offset).
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from kptrace.kernel.maps import MapSpec
from kptrace.model.errors import CompileError

_K = TypeVar("_K")
_V = TypeVar("_V")

_INSN = struct.Struct("<BBhi")
_LD_IMM64 = 0x18
_CALL = 0x85
_MOV64_K, _MOV32_K = 0xB7, 0xB4
_MOV64_X, _MOV32_X = 0xBF, 0xBC
_ADD64_K = 0x07
_LOADS = (0x61, 0x69, 0x71, 0x79)  # of 4, 2, 1 and 8 bytes
_PSEUDO_MAP_FD = 1
_PSEUDO_KFUNC_CALL = 2
_PSEUDO_MAP_VALUE = 2

#: Placeholder immediates: types.h has the same numbers.
KFUNC_BASE = 0x7FFF0001
CONSTANT_BASE = 0x7ABC1000
VALUE_BASE = 0x7ABC2000
LOW32_MARK = 0x7ABC0001
FIELD_BASE = 0x7A00


@dataclass(frozen=True, slots=True)
class Function:
    """One compiled program function.

    Attributes:
        code: instructions, 8 bytes each.
        maps: instruction index of each map reference to the map's name.
    """

    code: bytes
    maps: Mapping[int, str]


@dataclass(frozen=True, slots=True)
class Bytecode:
    """What the compile child hands back for one source file and one set of options."""

    functions: Mapping[str, Function]
    maps: Mapping[str, MapSpec]
    values: Mapping[str, int]


def link(
    function: Function,
    *,
    map_fds: Mapping[str, int],
    kfuncs: Mapping[int, int] | None = None,
    constants: Mapping[int, int] | None = None,
    values: Mapping[int, str] | None = None,
    fields: Mapping[int, int] | None = None,
) -> bytes:
    """Fill the holes of one function.

    Args:
        function: as compiled.
        map_fds: map name to descriptor.
        kfuncs: placeholder number (0, 1, ...) to BTF id of the kernel function.
        constants: placeholder number to the 32-bit value to put in.
        values: placeholder number to the name of the one-element array map whose value is meant.
        fields: placeholder number to the offset to load from.

    Raises:
        CompileError: a hole has no filling.
    """
    kfuncs, constants, values, fields = kfuncs or {}, constants or {}, values or {}, fields or {}
    code = bytearray(function.code)
    for index in range(len(code) // 8):
        at = index * 8
        op, regs, off, imm = _INSN.unpack_from(code, at)
        if index in function.maps:
            name = function.maps[index]
            _INSN.pack_into(
                code, at, op, (regs & 0x0F) | _PSEUDO_MAP_FD << 4, off, _filling(map_fds, name, "map")
            )
        elif op == _CALL and KFUNC_BASE <= imm < KFUNC_BASE + 16:
            btf_id = _filling(kfuncs, imm - KFUNC_BASE, "kernel function")
            _INSN.pack_into(code, at, op, (regs & 0x0F) | _PSEUDO_KFUNC_CALL << 4, 0, btf_id)
        elif op == _LD_IMM64 and VALUE_BASE <= imm < VALUE_BASE + 16:
            fd = _filling(map_fds, _filling(values, imm - VALUE_BASE, "map value"), "map")
            _INSN.pack_into(code, at, op, (regs & 0x0F) | _PSEUDO_MAP_VALUE << 4, off, fd)
        elif op in (_MOV64_K, _MOV32_K, _LD_IMM64) and CONSTANT_BASE <= imm < CONSTANT_BASE + 64:
            value = _filling(constants, imm - CONSTANT_BASE, "constant")
            _INSN.pack_into(code, at, op, regs, off, value - (1 << 32) if value >= 1 << 31 else value)
        elif op in _LOADS and FIELD_BASE <= off < FIELD_BASE + 64:
            _INSN.pack_into(code, at, op, regs, _filling(fields, off - FIELD_BASE, "field"), imm)
        elif op == _ADD64_K and imm == LOW32_MARK:
            # A 32-bit register move turns a kernel pointer into a scalar, which pointer arithmetic may not. BCC's
            # default target has no such instruction, so the source marks the 64-bit move before this addition.
            if index == 0 or code[at - 8] != _MOV64_X:
                raise CompileError(
                    "the low-32 mark does not follow a register move", remedy="report this as a bug"
                )
            code[at - 8] = _MOV32_X
            _INSN.pack_into(code, at, op, regs, 0, 0)
    return bytes(code)


def _filling(table: Mapping[_K, _V], key: _K, kind: str) -> _V:
    try:
        return table[key]
    except KeyError:
        raise CompileError(
            f"no {kind} {key!r} to link the program with", remedy="report this as a bug"
        ) from None
