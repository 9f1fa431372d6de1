# SPDX-License-Identifier: Apache-2.0
"""What is filled into the programs, from BTF of several shapes, and that C's and Python's enumerations are one."""

import re
from pathlib import Path

import pytest

from kptrace.kernel.btf import Btf, BtfMissing
from kptrace.kernel.registers import registers
from kptrace.model.errors import UnsupportedError
from kptrace.signals.lookup_function_layout import FUNCTIONS, Hole, holes
from tests.unit.c_layout import BPF
from tests.unit.kernel.btf_blob import Blob

NFT, IPT, IP6T = FUNCTIONS
SOURCE = BPF / "include/kptrace/arguments.h"
X86 = registers("x86_64")


def kernel(*, old: bool = False, prototypes: bool = True, table_init: bool = False, nft: bool = True) -> Btf:
    """A kernel like one before v5.16 (`old`) or since; offsets are in bits."""
    blob = Blob()
    number = blob.integer("int", 4)
    void = blob.add(2, "", 0)
    common = blob.struct("ns_common", 24, [("inum", number, 128)])
    blob.struct("net", 256, [("ns", common, 64)])
    buffer = blob.struct("sk_buff", 256, [("_nfct", number, 832)])
    blob.struct("nf_conn", 256, [("status", number, 1024)])
    state = blob.struct("nf_hook_state", 48, [("hook", number, 0), ("pf", number, 8), ("net", void, 256)])
    members = [("name", number, 448), ("priority", number, 416)]
    table = blob.struct("xt_table", 88, [*members, *([("table_init", void, 512)] if table_init else [])])
    pointer = {name: blob.add(2, "", target) for name, target in (("state", state), ("table", table))}
    skb = blob.add(2, "", blob.add(10, "", buffer))  # a const one: seen through
    if nft:
        ops = blob.struct("nf_hook_ops", 40, [("priority", number, 256)])
        chain = blob.struct(
            "nft_chain", 128, [("table", void, 512), ("handle", void, 576), ("name", void, 704)]
        )
        blob.struct("nft_base_chain", 256, [("ops", ops, 256), ("type", void, 576), ("chain", chain, 896)])
        blob.struct("nft_chain_type", 32, [("name", void, 0), ("type", number, 64)])
        family = ("family", number, 6 << 24 | 2978)
        blob.struct("nft_table", 512, [("handle", void, 2880), family, ("name", void, 3072)], flag=True)
        blob.enum("nft_chain_types", [("NFT_CHAIN_T_DEFAULT", 0), ("NFT_CHAIN_T_NAT", 2)])
        if old:
            xt = blob.struct("xt_action_param", 48, [("state", void, 128)])
            packet = blob.struct("nft_pktinfo", 64, [("skb", void, 0), ("xt", xt, 128)])
        else:
            packet = blob.struct("nft_pktinfo", 64, [("skb", void, 0), ("state", void, 64)])
        if prototypes:
            blob.function("nft_do_chain", [("pkt", blob.add(2, "", packet)), ("priv", void)])
    if prototypes:
        arguments = [("skb", skb), ("state", pointer["state"])]
        arguments = [*arguments, ("table", pointer["table"])] if old else [("priv", void), *arguments]
        for name in ("ipt_do_table", "ip6t_do_table"):
            blob.function(name, arguments)
    return Btf.parse(blob.pack())


def test_the_enumeration_is_that_of_the_source() -> None:
    """Names and order of the holes are the C source's, and none has a number that the loader does not look for."""
    text = SOURCE.read_text()
    body = text[text.index("enum {") : text.index("HOST_NETNS,\n};") + len("HOST_NETNS,")]
    names = re.findall(r"^\t([A-Z_0-9]+),", body, re.MULTILINE)
    assert names == [hole.name for hole in Hole]
    assert len(Hole) <= 64


def test_arguments_since_the_table_is_a_hooks_private_pointer() -> None:
    """(priv, skb, state), each 8 bytes in a tracing program's context, the result after them."""
    found = holes(kernel(), IPT, None)
    assert [found[h] for h in (Hole.ARG_TABLE, Hole.ARG_SKB, Hole.ARG_STATE, Hole.ARG_RESULT)] == [
        0,
        8,
        16,
        24,
    ]
    assert Hole.ARG_STACK not in found
    assert (found[Hole.XT_NAME], found[Hole.XT_PRIORITY]) == (56, 52)


def test_arguments_before_that() -> None:
    """(skb, state, table): decided by the prototype."""
    found = holes(kernel(old=True), IP6T, None)
    assert [found[h] for h in (Hole.ARG_SKB, Hole.ARG_STATE, Hole.ARG_TABLE, Hole.ARG_RESULT)] == [
        0,
        8,
        16,
        24,
    ]


def test_without_a_prototype_the_structure_tells() -> None:
    """A table with `table_init` is from before; without either nothing is guessed."""
    found = holes(kernel(prototypes=False, table_init=True), IPT, X86)
    assert [found[h] for h in (Hole.ARG_SKB, Hole.ARG_STATE, Hole.ARG_TABLE)] == [112, 104, 96]
    with pytest.raises(BtfMissing):
        holes(kernel(prototypes=False), IPT, X86)


def test_nf_tables_structures() -> None:
    """What is before the chain in a base chain has negative offsets; a bit-field is found by byte and shift."""
    found = holes(kernel(), NFT, None)
    assert [found[h] for h in (Hole.ARG_PACKET, Hole.ARG_CHAIN, Hole.ARG_RESULT)] == [0, 8, 16]
    assert (found[Hole.BASE_PRIORITY], found[Hole.BASE_TYPE]) == (32 + 32 - 112, 72 - 112)
    assert (found[Hole.TABLE_FAMILY], found[Hole.TABLE_FAMILY_SHIFT]) == (372, 2)
    assert (found[Hole.PACKET_STATE], found[Hole.TYPE_NAT], found[Hole.NET_INUM]) == (8, 2, 24)
    assert found[Hole.CONN_STATUS] == 128


def test_the_state_in_the_part_for_xtables() -> None:
    """Before v5.16 the state is one structure deeper."""
    assert holes(kernel(old=True), NFT, None)[Hole.PACKET_STATE] == 16 + 16


def test_what_the_btf_does_not_have_is_named() -> None:
    """Without nf_tables' own BTF there is nothing to fill in."""
    with pytest.raises(BtfMissing) as caught:
        holes(kernel(nft=False), NFT, X86)
    assert caught.value.name == "nft_pktinfo"


@pytest.mark.parametrize(("machine", "pops"), [("x86_64", 8), ("aarch64", 0)])
def test_a_return_is_found_by_its_stack_pointer(machine: str, pops: int) -> None:
    """Of each machine's registers; on arm64 the return address is in a register, so nothing is taken off the stack."""
    layout = registers(machine)
    found = holes(kernel(), NFT, layout)
    assert (found[Hole.ARG_STACK], found[Hole.STACK_RETURN]) == (layout.stack, pops)
    assert len({found[h] for h in (Hole.SAVED_0, Hole.SAVED_1, Hole.SAVED_2, Hole.SAVED_3)}) == 4
    assert found[Hole.ARG_RESULT] == layout.result


def test_an_unknown_machine_is_said_to_be() -> None:
    """No guess about registers."""
    with pytest.raises(UnsupportedError, match="riscv64"):
        registers("riscv64")


@pytest.mark.parametrize(
    ("machine", "names"),
    [
        ("x86_64", {"arguments": ("di", "si", "dx", "cx"), "saved": ("bx", "bp", "r12", "r13")}),
        (
            "aarch64",
            {
                "arguments": tuple(f"regs[{n}]" for n in range(4)),
                "saved": tuple(f"regs[{n}]" for n in range(19, 23)),
            },
        ),
    ],
)
def test_registers_are_where_the_compiler_has_them(
    tmp_path: Path, machine: str, names: dict[str, tuple[str, ...]]
) -> None:
    """Against the stub tree's `struct pt_regs`, which is the architecture's."""
    from tests.unit.kernel.test_headers import run_c, write_tree

    layout = registers(machine)
    write_tree(tmp_path, machine=machine, release="6.1", page_size=4096)
    pairs = [
        *zip(names["arguments"], layout.arguments, strict=True),
        *zip(names["saved"], layout.saved, strict=True),
    ]
    pairs += [("sp", layout.stack), ("ax" if machine == "x86_64" else "regs[0]", layout.result)]
    checks = "".join(
        f'_Static_assert(__builtin_offsetof(struct pt_regs, {name}) == {at}, "{name}");\n'
        for name, at in pairs
    )
    run_c(tmp_path, f"#include <uapi/linux/ptrace.h>\n{checks}int main(void) {{ return 0; }}", run=False)
