# SPDX-License-Identifier: Apache-2.0
"""What bpf/lookup_function.bpf.c needs to know of one function and the structures it walks, from BTF. Pure.

Everything is decided by what the BTF has, never by a version. On arm64 only the registers of kprobes differ
(`kptrace.kernel.registers`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum, auto
from typing import Final

from kptrace.kernel.btf import Btf, BtfMissing
from kptrace.kernel.registers import Registers


@dataclass(frozen=True, slots=True)
class Function:
    """A kernel function whose duration is one look-up.

    Attributes:
        name: as the kernel calls it.
        module: where it is unless it is built in.
        enter, leave: the programs at its entry and at its return.
    """

    name: str
    module: str
    enter: str
    leave: str

    @property
    def legacy(self) -> bool:
        """Whether it walks a table of iptables-legacy."""
        return self.name != "nft_do_chain"


FUNCTIONS: Final = (
    Function("nft_do_chain", "nf_tables", "nft_enter", "nft_leave"),
    Function("ipt_do_table", "ip_tables", "table_enter", "table_leave"),
    Function("ip6t_do_table", "ip6_tables", "table_enter", "table_leave"),
)


class Hole(IntEnum):
    """What is filled in when a program is loaded: the enumeration in bpf/include/kptrace/arguments.h has the same order."""

    ARG_PACKET = 0
    ARG_CHAIN = auto()
    ARG_SKB = auto()
    ARG_STATE = auto()
    ARG_TABLE = auto()
    ARG_RESULT = auto()
    ARG_STACK = auto()
    STACK_RETURN = auto()
    SAVED_0 = auto()
    SAVED_1 = auto()
    SAVED_2 = auto()
    SAVED_3 = auto()
    PACKET_SKB = auto()
    PACKET_STATE = auto()
    STATE_HOOK = auto()
    STATE_PF = auto()
    STATE_NET = auto()
    NET_INUM = auto()
    SKB_NFCT = auto()
    CONN_STATUS = auto()
    CHAIN_TABLE = auto()
    CHAIN_HANDLE = auto()
    CHAIN_NAME = auto()
    TABLE_HANDLE = auto()
    TABLE_NAME = auto()
    TABLE_FAMILY = auto()
    TABLE_FAMILY_SHIFT = auto()
    BASE_PRIORITY = auto()
    BASE_TYPE = auto()
    TYPE_TYPE = auto()
    TYPE_NAT = auto()
    XT_NAME = auto()
    XT_PRIORITY = auto()
    HOST_NETNS = auto()


Holes = Mapping[Hole, int]

_COMMON: Final = {
    Hole.STATE_HOOK: ("nf_hook_state", "hook"),
    Hole.STATE_PF: ("nf_hook_state", "pf"),
    Hole.STATE_NET: ("nf_hook_state", "net"),
    Hole.NET_INUM: ("net", "ns.inum"),
    Hole.SKB_NFCT: ("sk_buff", "_nfct"),
}
_NFT: Final = {
    Hole.PACKET_SKB: ("nft_pktinfo", "skb"),
    Hole.CHAIN_TABLE: ("nft_chain", "table"),
    Hole.CHAIN_HANDLE: ("nft_chain", "handle"),
    Hole.CHAIN_NAME: ("nft_chain", "name"),
    Hole.TABLE_HANDLE: ("nft_table", "handle"),
    Hole.TABLE_NAME: ("nft_table", "name"),
    Hole.TYPE_TYPE: ("nft_chain_type", "type"),
}
_LEGACY: Final = {Hole.XT_NAME: ("xt_table", "name"), Hole.XT_PRIORITY: ("xt_table", "priority")}


def holes(btf: Btf, function: Function, registers: Registers | None) -> Holes:
    """What to fill in for a function, all but `Hole.HOST_NETNS`.

    Args:
        btf: of the module that has the function, or of the kernel where it is built in or its module has none.
        function: the function.
        registers: for kprobes; None for fentry and fexit, whose context is the arguments in a row.

    Raises:
        BtfMissing: the BTF does not have what is needed.
    """
    found = {hole: btf.member_offset(*member) for hole, member in _COMMON.items()}
    # Without conntrack there is no status to look at: 0 says so.
    found[Hole.CONN_STATUS] = _optional(btf, "nf_conn", "status")
    found |= _legacy(btf) if function.legacy else _nft(btf)
    arguments = _legacy_arguments(btf, function) if function.legacy else _nft_arguments(btf, function)
    count = len(arguments)
    places = registers.arguments if registers else tuple(range(0, 8 * count, 8))
    found |= {hole: places[number] for hole, number in arguments.items()}
    found[Hole.ARG_RESULT] = registers.result if registers else 8 * count
    if registers:
        found[Hole.ARG_STACK] = registers.stack
        found[Hole.STACK_RETURN] = registers.return_pops
        found |= zip((Hole.SAVED_0, Hole.SAVED_1, Hole.SAVED_2, Hole.SAVED_3), registers.saved, strict=True)
    return found


def _nft(btf: Btf) -> dict[Hole, int]:
    found = {hole: btf.member_offset(*member) for hole, member in _NFT.items()}
    # Before v5.16 the state is in the part for xtables' matches.
    found[Hole.PACKET_STATE] = _optional(btf, "nft_pktinfo", "state") or btf.member_offset(
        "nft_pktinfo", "xt.state"
    )
    # The function gets the chain in a base chain: what is before it has negative offsets.
    base = btf.member_offset("nft_base_chain", "chain")
    found[Hole.BASE_PRIORITY] = btf.member_offset("nft_base_chain", "ops.priority") - base
    found[Hole.BASE_TYPE] = btf.member_offset("nft_base_chain", "type") - base
    found[Hole.TYPE_NAT] = btf.enum_value("NFT_CHAIN_T_NAT")
    # A bit-field of six bits, read with the 8 bytes that begin where it does.
    bits = btf.member_offset_bits("nft_table", "family")
    found[Hole.TABLE_FAMILY], found[Hole.TABLE_FAMILY_SHIFT] = divmod(bits, 8)
    return found


def _legacy(btf: Btf) -> dict[Hole, int]:
    return {hole: btf.member_offset(*member) for hole, member in _LEGACY.items()}


def _nft_arguments(btf: Btf, function: Function) -> dict[Hole, int]:
    pointers = btf.function_pointers(function.name)
    return {
        Hole.ARG_PACKET: _index(pointers, "nft_pktinfo", function),
        Hole.ARG_CHAIN: _void(pointers, function),
    }


def _legacy_arguments(btf: Btf, function: Function) -> dict[Hole, int]:
    """The table comes last, typed, and since v5.16 first, as a hook's private pointer.

    Linux kernel commit 8844e01062dd ("netfilter: iptables: allow use of ipt_do_table as hookfn") (in v5.16). Where the
    module has no BTF (before v5.11), a table that still has its `table_init`, which went away earlier, is from before.
    """
    try:
        pointers = btf.function_pointers(function.name)
    except BtfMissing:
        btf.member_offset("xt_table", "table_init")
        pointers = ("sk_buff", "nf_hook_state", "xt_table")
    return {
        Hole.ARG_SKB: _index(pointers, "sk_buff", function),
        Hole.ARG_STATE: _index(pointers, "nf_hook_state", function),
        Hole.ARG_TABLE: pointers.index("xt_table") if "xt_table" in pointers else _void(pointers, function),
    }


def _index(pointers: tuple[str, ...], name: str, function: Function) -> int:
    if name not in pointers:
        raise BtfMissing(f"{name} among the arguments of {function.name}", "pointer to")
    return pointers.index(name)


def _void(pointers: tuple[str, ...], function: Function) -> int:
    return _index(pointers, "", function)


def _optional(btf: Btf, struct_name: str, member: str) -> int:
    """The offset, or 0 where there is no such thing; none of those asked for is first in its structure."""
    try:
        return btf.member_offset(struct_name, member)
    except BtfMissing:
        return 0
