# SPDX-License-Identifier: Apache-2.0
"""Linking fills every hole of a compiled function and touches nothing else."""

import struct

import pytest

from kptrace.kernel.bytecode import (
    CONSTANT_BASE,
    FIELD_BASE,
    KFUNC_BASE,
    LOW32_MARK,
    VALUE_BASE,
    Function,
    link,
)
from kptrace.model.errors import CompileError


def insn(op: int, regs: int = 0, off: int = 0, imm: int = 0) -> bytes:
    """One BPF instruction."""
    return struct.pack("<BBhi", op, regs, off, imm)


def test_a_map_reference_gets_its_descriptor() -> None:
    """The two halves of a map load become BPF_PSEUDO_MAP_FD with the descriptor."""
    function = Function(insn(0x18, 0x01) + insn(0), {0: "cells"})
    assert link(function, map_fds={"cells": 7}) == insn(0x18, 0x11, 0, 7) + insn(0)


def test_a_map_value_gets_its_maps_descriptor() -> None:
    """The marked 64-bit load becomes BPF_PSEUDO_MAP_VALUE with the descriptor, at offset 0 of the value."""
    function = Function(insn(0x18, 0x03, 0, VALUE_BASE + 1) + insn(0), {})
    assert link(function, map_fds={"slots": 9}, values={1: "slots"}) == insn(0x18, 0x23, 0, 9) + insn(0)


def test_a_kernel_function_call_gets_its_btf_id() -> None:
    """A placeholder call becomes BPF_PSEUDO_KFUNC_CALL with the BTF id; helper calls stay."""
    function = Function(insn(0x85, 0, 0, KFUNC_BASE + 1) + insn(0x85, 0, 0, 201), {})
    assert link(function, map_fds={}, kfuncs={1: 4242}) == insn(0x85, 0x20, 0, 4242) + insn(0x85, 0, 0, 201)


@pytest.mark.parametrize(("value", "immediate"), [(0, 0), (127, 127), (0xFFFFFFFF, -1)])
def test_a_constant_gets_its_value(value: int, immediate: int) -> None:
    """A placeholder move gets the 32-bit value, the sign bit included."""
    function = Function(insn(0xB7, 3, 0, CONSTANT_BASE + 2), {})
    assert link(function, map_fds={}, constants={2: value}) == insn(0xB7, 3, 0, immediate)


@pytest.mark.parametrize("op", [0x61, 0x69, 0x71, 0x79])
def test_a_load_gets_its_offset(op: int) -> None:
    """A load of any width at a placeholder offset gets the real one; others stay."""
    function = Function(insn(op, 0x12, FIELD_BASE + 3) + insn(op, 0x12, 8) + insn(0x7B, 0x12, FIELD_BASE), {})
    expected = insn(op, 0x12, 372) + insn(op, 0x12, 8) + insn(0x7B, 0x12, FIELD_BASE)
    assert link(function, map_fds={}, fields={3: 372}) == expected


def test_the_low_32_bits_of_a_pointer_become_a_number() -> None:
    """The marked 64-bit move becomes a 32-bit one, the mark an addition of zero."""
    function = Function(insn(0xBF, 0x12) + insn(0x07, 0x02, 0, LOW32_MARK), {})
    assert link(function, map_fds={}) == insn(0xBC, 0x12) + insn(0x07, 0x02, 0, 0)


@pytest.mark.parametrize(
    "function",
    [
        Function(insn(0x18, 0x01) + insn(0), {0: "unknown"}),
        Function(insn(0x85, 0, 0, KFUNC_BASE), {}),
        Function(insn(0xB7, 0, 0, CONSTANT_BASE), {}),
        Function(insn(0x07, 0, 0, LOW32_MARK), {}),
        Function(insn(0x18, 0, 0, VALUE_BASE) + insn(0), {}),
        Function(insn(0x79, 0, FIELD_BASE), {}),
    ],
)
def test_a_hole_without_filling_is_an_error(function: Function) -> None:
    """Nothing is loaded with a hole in it."""
    with pytest.raises(CompileError):
        link(function, map_fds={})
