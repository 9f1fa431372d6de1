# SPDX-License-Identifier: Apache-2.0
"""Legacy xtables: which tables a namespace has, where they hook, and what a replacement's header says.

A legacy table announces nothing and has no names but these: its hooks sit at priorities fixed in the kernel.
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kptrace.model.netfilter import BaseChain, ChainType, DataPlane, Hook, IpFamily

_NAMES_FILES: Final = {IpFamily.IPV4: "ip_tables_names", IpFamily.IPV6: "ip6_tables_names"}
_LOCAL: Final = (Hook.INPUT, Hook.FORWARD, Hook.OUTPUT)

#: `enum nf_ip_hook_priorities`, the same for both families: table to its hooks and priorities.
_HOOKS: Final[dict[str, dict[Hook, int]]] = {
    "raw": dict.fromkeys((Hook.PREROUTING, Hook.OUTPUT), -300),
    "mangle": dict.fromkeys(Hook, -150),
    "nat": {Hook.PREROUTING: -100, Hook.INPUT: 100, Hook.OUTPUT: -100, Hook.POSTROUTING: 100},
    "filter": dict.fromkeys(_LOCAL, 0),
    "security": dict.fromkeys(_LOCAL, 50),
}

#: `struct ipt_replace` and `struct ip6t_replace` up to the counters' pointer: the same for 32-bit writers.
_REPLACE: Final = struct.Struct("=32s3I5I5II")
_REPLACE_START: Final = struct.Struct("=32s3I")


@dataclass(frozen=True, slots=True)
class Replace:
    """The header of an IPT_SO_SET_REPLACE: a table's whole new contents follow it.

    Attributes:
        table: name.
        valid_hooks: bit mask of hook numbers.
        entries: rules and chain ends in the new table (a user chain has two besides its rules, a built-in one, and one
            error entry ends the table).
        size: bytes of the new entries.
        old_entries: entries of the table that is replaced; None if the copy was too short to hold it.
    """

    table: str
    valid_hooks: int
    entries: int
    size: int
    old_entries: int | None


def decode_replace(data: bytes) -> Replace | None:
    """Read the header from the start of the option's value, as long a copy as there is; None if it is too short."""
    if len(data) < _REPLACE_START.size:
        return None
    name, valid_hooks, entries, size = _REPLACE_START.unpack_from(data)
    old = _REPLACE.unpack_from(data)[-1] if len(data) >= _REPLACE.size else None
    table = name.split(b"\0", 1)[0].decode(errors="backslashreplace")
    return Replace(table, valid_hooks, entries, size, old)


def table_names(proc_net: Path) -> dict[IpFamily, frozenset[str]]:
    """The tables of the namespace whose `/proc/.../net` this is; none where the kernel has no such tables.

    Raises:
        PermissionError: the files are root's.
    """
    found = {}
    for family, file in _NAMES_FILES.items():
        try:
            found[family] = frozenset((proc_net / file).read_text(errors="backslashreplace").split())
        except FileNotFoundError:
            found[family] = frozenset()
    return found


def legacy_chains(names: dict[IpFamily, frozenset[str]]) -> tuple[BaseChain, ...]:
    """One base chain for every hook of every table, sorted; a table of another name is none of the kernel's own."""
    return tuple(
        sorted(
            BaseChain(family, hook, priority, DataPlane.IPTABLES_LEGACY, table, hook.name, _type(table, hook))
            for family, tables in names.items()
            for table in tables & _HOOKS.keys()
            for hook, priority in _HOOKS[table].items()
        )
    )


def _type(table: str, hook: Hook) -> ChainType:
    if table == "nat":
        return ChainType.NAT
    # Mangle's OUTPUT routes a packet again whose mark or addresses it changed.
    return ChainType.ROUTE if table == "mangle" and hook is Hook.OUTPUT else ChainType.FILTER
