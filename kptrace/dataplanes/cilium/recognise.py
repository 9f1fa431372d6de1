# SPDX-License-Identifier: Apache-2.0
"""Which of the known layouts a map in the kernel has. Pure.

The agent pins a map under its whole name, but the kernel keeps 15 characters of it: `cilium_lb4_backends_v2` and `_v3` are
one name there. So a map is told by its whole name where that is known, and by its sizes in any case: never by a version.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from kptrace.dataplanes.cilium.layout_table import LAYOUTS
from kptrace.dataplanes.cilium.layouts import KERNEL_NAME, PREFIX, Layout, Role, unversioned
from kptrace.dataplanes.cilium.records import Record


@dataclass(frozen=True, slots=True)
class UnknownLayout:
    """A map of Cilium's that cannot be read.

    Attributes:
        role: what it is for.
        name: whole, where that is known, or as the kernel keeps it.
        detail: why, for a person.
    """

    role: Role
    name: str
    detail: str


def recognise(
    full_name: str, truncated_name: str, map_type: int, key_size: int, value_size: int
) -> Layout | UnknownLayout | None:
    """Which layout a map has.

    Args:
        full_name: the name of its pin; empty where that is not known.
        truncated_name: what the kernel keeps of its name.
        map_type: `enum bpf_map_type`.
        key_size: bytes.
        value_size: bytes, of one CPU.

    Returns:
        The layout, of role OTHER for maps of Cilium's that nobody reads here; `UnknownLayout` where a map that should be
        read has none of the known layouts; None for others' maps.
    """
    name = full_name or truncated_name
    if not name.startswith(PREFIX):
        return None
    if full_name:
        found = [layout for layout in LAYOUTS if layout.named(full_name)]
    else:
        found = [layout for layout in LAYOUTS if layout.may_be(truncated_name)]
        longest = max((len(layout.name[:KERNEL_NAME]) for layout in found), default=0)
        found = [layout for layout in found if len(layout.name[:KERNEL_NAME]) == longest]
    fitting = [layout for layout in found if layout.fits(map_type, key_size, value_size)]
    if fitting:
        return max(fitting, key=lambda layout: layout.value is not None)
    kin = found or _kin(full_name)
    if kin:
        return UnknownLayout(kin[0].role, name, _refusal(name, kin, map_type, key_size, value_size))
    return Layout(Role.OTHER, name, frozenset({map_type}), Record(key_size), Record(value_size))


def _kin(full_name: str) -> list[Layout]:
    """The layouts of other versions of a map."""
    stem = unversioned(full_name)
    return [
        each
        for each in LAYOUTS
        if (stem.startswith(each.stem) and stem != full_name if each.many else stem == each.stem)
    ]


def _refusal(name: str, known: Iterable[Layout], map_type: int, key_size: int, value_size: int) -> str:
    sizes = "; ".join(
        f"{each.name}{'*' if each.many else ''} {each.key.size if each.key else '?'}"
        f"/{each.value.size if each.value else '?'} of type {', '.join(map(str, sorted(each.types)))}"
        for each in known
    )
    return (
        f"{name} has keys of {key_size} and values of {value_size} bytes and is of type {map_type}: "
        f"no layout that is known ({sizes}); it is not read"
    )
