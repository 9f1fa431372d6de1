# SPDX-License-Identifier: Apache-2.0
"""What the kernel counts look-ups under, and what that is called: pure, a mirror of bpf/include/kptrace/places.h.

A place is a chain by its name, its hook, the packets' family, and whether it is in the watched network namespace or in
another one: pods' namespaces are not told apart, since there may be any number of them, and their chains share 64 numbers.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from kptrace.dataplanes.nftables.chains import dataplane_of
from kptrace.model.metrics import OTHER
from kptrace.model.netfilter import DataPlane, Hook, IpFamily
from kptrace.signals.lookup_cells import BracketLabels
from kptrace.signals.lookup_names import KUBE_PROXY_TABLE, cut

HOST_PLACES: Final = 152
POD_PLACES: Final = 64
OTHER_PLACE: Final = HOST_PLACES + POD_PLACES
PLACES: Final = 256
#: Names that are neither kube-proxy's nor iptables' own, each first come, first served.
FOREIGN_HOST_NAMES: Final = 32
FOREIGN_POD_NAMES: Final = 8

_NAME: Final = struct.Struct("=5B3x64s64s")
NAME_BYTES: Final = _NAME.size
#: `struct learnt`: where free numbers begin (host, pod), whether NAT was seen (4), chains without a number of their own.
LEARNT: Final = struct.Struct("=7Q")
_FAMILIES: Final = {family.nfproto: family for family in IpFamily}


@dataclass(frozen=True, slots=True)
class Place:
    """One number's meaning.

    Attributes:
        pod: whether it is in another network namespace than the watched one.
        labels: as the chain is called, unbounded.
    """

    pod: bool
    labels: BracketLabels

    @property
    def netns(self) -> str:
        """The label value."""
        return "pod" if self.pod else "host"

    @property
    def foreign(self) -> bool:
        """Whether its name is one whose number must be bounded; in a pod anybody may call a table kube-proxy."""
        if self.labels.dataplane in (DataPlane.IPTABLES_NFT, DataPlane.IPTABLES_LEGACY):
            return False
        return self.pod or self.labels.table != KUBE_PROXY_TABLE

    @classmethod
    def decode(cls, value: bytes) -> "Place":
        """Read `struct name`."""
        pod, legacy, nfproto, hook_number, table_family, table_bytes, chain_bytes = _NAME.unpack(value)
        hook = Hook(hook_number)
        table, chain = _text(table_bytes), _text(chain_bytes)
        if legacy:
            # iptables calls a table's built-in chains like their hooks, in capital letters.
            dataplane, chain = DataPlane.IPTABLES_LEGACY, hook.name
        else:
            dataplane = dataplane_of(table_family, table, chain, hook)
        return cls(bool(pod), BracketLabels(dataplane, _FAMILIES[nfproto], hook, table, chain))


def folded(number: int) -> Place:
    """The place of all chains of one hook that got no number of their own; `number` from `OTHER_PLACE` on."""
    rest, hook = divmod(number - OTHER_PLACE, len(Hook))
    pod, legacy, ipv6 = rest >> 2 & 1, rest >> 1 & 1, rest & 1
    dataplane = DataPlane.IPTABLES_LEGACY if legacy else DataPlane.OTHER
    family = IpFamily.IPV6 if ipv6 else IpFamily.IPV4
    return Place(bool(pod), BracketLabels(dataplane, family, Hook(hook), OTHER, OTHER))


def bounded(places: Mapping[int, Place]) -> dict[Place, tuple[int, ...]]:
    """The places as they are exposed, each with the numbers that are counted under it.

    A number is never given twice and names are known in the order of the numbers, so a label never changes.
    """
    known = {**places, **{number: folded(number) for number in range(OTHER_PLACE, PLACES)}}
    left = {False: FOREIGN_HOST_NAMES, True: FOREIGN_POD_NAMES}
    told: set[tuple[bool, str, str]] = set()
    exposed: dict[Place, tuple[int, ...]] = {}
    for number, place in sorted(known.items()):
        name = (place.pod, place.labels.table, place.labels.chain)
        shown = place
        if place.foreign and number < OTHER_PLACE and name not in told:
            if left[place.pod]:
                left[place.pod] -= 1
                told.add(name)
            else:
                labels = place.labels
                shown = Place(
                    place.pod, BracketLabels(labels.dataplane, labels.family, labels.hook, OTHER, OTHER)
                )
        exposed[shown] = (*exposed.get(shown, ()), number)
    return exposed


def _text(value: bytes) -> str:
    return cut(value.split(b"\0", 1)[0].decode(errors="ignore"))
