# SPDX-License-Identifier: Apache-2.0
"""The endpoints of Service ports, unpacked when they are asked for."""

from collections.abc import Iterable, Iterator, Mapping

from kptrace.identity.packing import PortKey
from kptrace.identity.records import SliceRecord
from kptrace.model.identity import Endpoint, ServicePort

#: What EndpointSlices call a Service port, and those that have endpoints for it.
Sources = tuple[PortKey, tuple[SliceRecord, ...]]


class JoinedEndpoints(Mapping[ServicePort, tuple[Endpoint, ...]]):
    """A mapping that never changes; each look at a Service port's endpoints unpacks them anew."""

    def __init__(self, sources: dict[ServicePort, Sources]) -> None:
        """Take these over; nobody may change them after that."""
        self._sources = sources

    def __getitem__(self, port: ServicePort) -> tuple[Endpoint, ...]:
        """In order, each address once: endpoints that move between slices are in two, and the readier counts."""
        key, slices = self._sources[port]
        found = [end for record in slices for name, ends in record.endpoints if name == key for end in ends]
        best: dict[tuple[str, int], Endpoint] = {}
        for endpoint in sorted(found, key=lambda end: (end.ready, end.serving, end)):
            best[endpoint.ip, endpoint.port] = endpoint
        return tuple(sorted(best.values()))

    def __iter__(self) -> Iterator[ServicePort]:
        """The Service ports that have endpoints."""
        return iter(self._sources)

    def __len__(self) -> int:
        """How many Service ports have endpoints."""
        return len(self._sources)

    def __contains__(self, port: object) -> bool:
        """Whether a Service port has endpoints."""
        return port in self._sources


def with_endpoints(key: PortKey, slices: Iterable[SliceRecord]) -> Sources | None:
    """The slices that have endpoints for a port, in an order of their own; None where none has."""
    found = [record for record in slices if key in record.packed.ports]
    return (key, tuple(sorted(found, key=lambda record: record.name))) if found else None
