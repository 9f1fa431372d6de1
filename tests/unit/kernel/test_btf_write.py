# SPDX-License-Identifier: Apache-2.0
"""BTF that kptrace writes itself, read back by its parser; that the kernel takes it is shown natively."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kptrace.kernel.btf import Btf, Kind
from kptrace.kernel.btf_write import CONTEXTS, program_btf
from kptrace.kernel.load import ProgramType

_NAMES = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,100}", fullmatch=True)


@given(name=_NAMES, kind=st.sampled_from(sorted(CONTEXTS)))
def test_the_function_has_its_name_and_its_context(name: str, kind: ProgramType) -> None:
    """Whatever the name, one function has it, takes a pointer to the context of its kind, and returns an int."""
    written = program_btf(name, kind)
    btf = Btf.parse(written.blob)
    function = btf.type(written.function)
    assert (function.kind, function.name) == (Kind.FUNC, name)
    assert btf.func_id(name) == written.function == btf.end_id - 1
    assert btf.function_pointers(name) == (CONTEXTS[kind],)
    returned = btf.type(btf.type(function.value).value)
    assert (returned.kind, returned.name, returned.value) == (Kind.INT, "int", 4)
    assert btf.integer(returned.id) == (True, False)


def test_function_info_points_to_the_first_instruction() -> None:
    """`struct bpf_func_info`: instruction 0 belongs to the function's type."""
    written = program_btf("cil_from_netdev", ProgramType.SCHED_CLS)
    assert written.function_info == struct.pack("=II", 0, written.function)


def test_a_kind_without_a_known_context_is_refused() -> None:
    """No context is made up for kinds that the kernel would not accept as targets."""
    with pytest.raises(KeyError):
        program_btf("x", ProgramType.KPROBE)
