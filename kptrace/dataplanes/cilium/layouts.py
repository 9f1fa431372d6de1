# SPDX-License-Identifier: Apache-2.0
"""What a layout of one of Cilium's maps is. Pure."""

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from kptrace.dataplanes.cilium.records import Record

PREFIX: Final = "cilium_"
#: Characters of a name that the kernel keeps: `BPF_OBJ_NAME_LEN` less the NUL.
KERNEL_NAME: Final = 15
_VERSION: Final = re.compile(r"_v\d+(?=_|$)")
_OTHER_VERSION: Final = re.compile(r"v\d")


class Role(StrEnum):
    """What a map of Cilium's is for, as a label value."""

    LB4_SERVICES = "lb4_services"
    LB6_SERVICES = "lb6_services"
    LB4_BACKENDS = "lb4_backends"
    LB6_BACKENDS = "lb6_backends"
    LB4_REVERSE_NAT = "lb4_reverse_nat"
    LB6_REVERSE_NAT = "lb6_reverse_nat"
    LB4_REVERSE_SK = "lb4_reverse_sk"
    LB6_REVERSE_SK = "lb6_reverse_sk"
    LB4_AFFINITY = "lb4_affinity"
    LB6_AFFINITY = "lb6_affinity"
    LB_AFFINITY_MATCH = "lb_affinity_match"
    LB4_SOURCE_RANGE = "lb4_source_range"
    LB6_SOURCE_RANGE = "lb6_source_range"
    LB4_MAGLEV = "lb4_maglev"
    LB6_MAGLEV = "lb6_maglev"
    CT4 = "ct4"
    CT_ANY4 = "ct_any4"
    CT6 = "ct6"
    CT_ANY6 = "ct_any6"
    POLICY = "policy"
    POLICY_STATS = "policystats"
    IPCACHE = "ipcache"
    LXC = "lxc"
    METRICS = "metrics"
    CALLS = "calls"
    CALL_POLICY = "call_policy"
    OTHER = "other"


@dataclass(frozen=True)
class Layout:
    """One layout of one of Cilium's maps.

    Attributes:
        role: what the map is for.
        name: the map's whole name; where `many`, how it begins: an endpoint's id or the like follows.
        types: `enum bpf_map_type`: any of these.
        key, value: what is in them; in a per-CPU map, of one CPU. None: of whatever size, not looked into.
        since: the releases that have it, as far as known.
        generation: grows with `since`: of two maps that are there for one role, the older one is an upgrade's leftover.
        many: whether there is one for each endpoint, or device.
    """

    role: Role
    name: str
    types: frozenset[int]
    key: Record | None = None
    value: Record | None = None
    since: str = ""
    generation: int = 0
    many: bool = False

    @property
    def stem(self) -> str:
        """The name without its version."""
        return unversioned(self.name)

    def named(self, whole: str) -> bool:
        """Whether a map of this whole name is such a map."""
        if not self.many:
            return whole == self.name
        return whole.startswith(self.name) and not _OTHER_VERSION.match(whole, len(self.name))

    def may_be(self, kernel_name: str) -> bool:
        """Whether a map may be such a map of which the kernel keeps this name."""
        cut = self.name[:KERNEL_NAME]
        return kernel_name.startswith(cut) if self.many else kernel_name == cut

    def endpoint(self, whole: str) -> int | None:
        """The endpoint's id in the whole name of a map of which each endpoint has one."""
        rest = whole.removeprefix(self.name) if self.many else ""
        return int(rest) if rest.isascii() and rest.isdigit() else None

    def fits(self, map_type: int, key_size: int, value_size: int) -> bool:
        """Whether type and sizes are this layout's."""
        sizes = ((self.key, key_size), (self.value, value_size))
        return map_type in self.types and all(record is None or record.size == size for record, size in sizes)


def unversioned(name: str) -> str:
    """A map's whole name without the `_v2` or the like in it."""
    return _VERSION.sub("", name)
