# SPDX-License-Identifier: Apache-2.0
"""Which Service ports have an endpoint at an address, of hundreds of thousands of addresses.

A dictionary from address to Service port would take some 50 MiB. This takes 8 bytes an address, in a sorted array of
checksums and numbers; what an answer says is then looked up in the packed endpoints themselves, so a checksum that two
addresses share does no harm, and neither does an entry of an endpoint that has gone.
"""

import zlib
from array import array
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Mapping

from kptrace.identity.packing import addresses
from kptrace.identity.records import SliceRecord
from kptrace.model.identity import Endpoint, ServicePort

#: After so many addresses that came since, all are sorted anew.
_MOST_RECENT = 1 << 14


class AddressIndex:
    """Follows changes, and works nothing out until it is asked. It belongs to one thread."""

    def __init__(self) -> None:
        """No endpoints are known."""
        self._ports: list[ServicePort] = []
        self._numbers: dict[ServicePort, int] = {}
        self._sorted = array("Q")
        self._recent: dict[int, set[int]] = defaultdict(set)
        self._changed: set[ServicePort] = set()

    def changed(self, port: ServicePort) -> None:
        """A Service port has other endpoints now, or none any more."""
        if self._sorted:
            self._changed.add(port)
            if (
                len(self._changed) > _MOST_RECENT
            ):  # nobody has asked for long: begin anew with the next question
                self._sorted = array("Q")
                self._changed.clear()

    def at(
        self,
        ip: str,
        slices: Mapping[ServicePort, Iterable[SliceRecord]],
        endpoints: Mapping[ServicePort, tuple[Endpoint, ...]],
    ) -> dict[ServicePort, tuple[Endpoint, ...]]:
        """The endpoints at an address, in its canonical form, by Service port.

        Args:
            ip: the address.
            slices: of every Service port that has endpoints.
            endpoints: the same, unpacked.
        """
        self._take(slices)
        key = zlib.crc32(ip.encode())
        numbers = set(self._recent.get(key, ()))
        index = bisect_left(self._sorted, key << 32)
        while index < len(self._sorted) and self._sorted[index] >> 32 == key:
            numbers.add(self._sorted[index] & 0xFFFFFFFF)
            index += 1
        found = {}
        for port in sorted(self._ports[number] for number in numbers):
            ends = tuple(end for end in endpoints.get(port, ()) if end.ip == ip)
            if ends:
                found[port] = ends
        return found

    def _take(self, slices: Mapping[ServicePort, Iterable[SliceRecord]]) -> None:
        """Take in what changed since the last question."""
        if len(self._changed) + len(self._recent) > _MOST_RECENT or not self._sorted:
            self._sort(slices)
            return
        for port in self._changed:
            number = self._number(port)
            for ip in _addresses(slices.get(port, ())):
                self._recent[zlib.crc32(ip.encode())].add(number)
        self._changed.clear()

    def _sort(self, slices: Mapping[ServicePort, Iterable[SliceRecord]]) -> None:
        self._ports, self._numbers = [], {}
        entries = (
            zlib.crc32(ip.encode()) << 32 | self._number(port)
            for port, records in slices.items()
            for ip in _addresses(records)
        )
        self._sorted = array("Q", sorted(entries))
        self._recent.clear()
        self._changed.clear()

    def _number(self, port: ServicePort) -> int:
        number = self._numbers.setdefault(port, len(self._ports))
        if number == len(self._ports):
            self._ports.append(port)
        return number


def _addresses(records: Iterable[SliceRecord]) -> set[str]:
    return {ip for record in records for ip in addresses(record.packed)}
