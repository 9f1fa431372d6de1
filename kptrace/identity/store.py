# SPDX-License-Identifier: Apache-2.0
"""The reducer from Kubernetes objects to snapshots: no I/O, no clock, and the same result for any order of events.

The cost of a change is that of the objects it touches, and one copy of each mapping of the snapshot that it changes;
mappings that did not change are shared with the snapshot before.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from kptrace.identity.addresses import AddressIndex
from kptrace.identity.claims import Claims
from kptrace.identity.joined import JoinedEndpoints, Sources, with_endpoints
from kptrace.identity.records import Kind, Name, NodeRecord, PodRecord, Record, ServiceRecord, SliceRecord
from kptrace.model.identity import Endpoint, Pod, Protocol, ServiceAddress, ServicePort, Snapshot


@dataclass(frozen=True, slots=True)
class Gone:
    """An object that was deleted."""

    kind: Kind
    key: Name


Event = Record | Gone


class Store:
    """All objects, and the indices that a snapshot is made of."""

    def __init__(self) -> None:
        self._objects: dict[Kind, dict[Name, Record]] = {kind: {} for kind in Kind}
        self._services: Claims[ServiceAddress, ServicePort] = Claims()
        self._node_ports: Claims[tuple[int, Protocol], ServicePort] = Claims()
        self._pods: Claims[str, Pod] = Claims()
        self._pods_by_uid: Claims[str, Pod] = Claims()
        self._by_address = AddressIndex()
        self._slices: dict[Name, dict[Name, SliceRecord]] = {}
        self._endpoints: dict[ServicePort, Sources] = {}
        self._endpoints_view: Mapping[ServicePort, tuple[Endpoint, ...]] | None = None
        self._nodes_view: Mapping[str, tuple[str, ...]] | None = None
        self._unjoined: set[Name] = set()
        self._changed = False
        self._newest = 0.0
        self._snapshot = Snapshot()

    def apply(
        self,
        event: Event,
        at: float = 0.0,
        about_to: Callable[[Record | None, Record | None], None] = lambda _old, _new: None,
    ) -> bool:
        """Add, replace or remove one object.

        Args:
            event: what to do.
            at: when the fact arrived (monotonic seconds).
            about_to: called with the object before and after it, before anything is done, where they differ.

        Returns:
            Whether anything is different now.
        """
        self._newest = max(self._newest, at)
        known = self._objects[event.kind]
        old = known.get(event.key)
        new = None if isinstance(event, Gone) else event
        if old == new:
            self._refresh(new)
            return False
        about_to(old, new)
        if old is not None:
            self._retract(old)
        if new is None:
            del known[event.key]
        else:
            known[new.key] = new
            self._assert(new)
        self._changed = True
        return True

    def replace(self, kind: Kind, records: Iterable[Record], at: float = 0.0) -> bool:
        """Make these all objects of the kind that there are. Returns whether anything is different now."""
        changes = [self.apply(event, at) for event in self.events_of(kind, records)]
        return any(changes)

    def events_of(self, kind: Kind, records: Iterable[Record]) -> Iterator[Event]:
        """What makes these all objects of the kind that there are; removals first."""
        listed = {record.key: record for record in records}
        yield from [Gone(kind, key) for key in self._objects[kind] if key not in listed]
        yield from listed.values()

    def endpoints_at(self, ip: str) -> Mapping[ServicePort, tuple[Endpoint, ...]]:
        """The endpoints at an address as of the last snapshot, by Service port. For the owner's thread."""
        slices = {port: records for port, (_, records) in self._endpoints.items()}
        return self._by_address.at(ip, slices, self._snapshot.endpoints)

    def services(self) -> Collection[Name]:
        """The names of all Services."""
        return self._objects[Kind.SERVICES].keys()

    def service(self, key: Name) -> ServiceRecord | None:
        """A Service, if there is one of this name."""
        record = self._objects[Kind.SERVICES].get(key)
        return record if isinstance(record, ServiceRecord) else None

    def slices_of(self, service: Name) -> Iterable[SliceRecord]:
        """The EndpointSlices of a Service, whether there is one or not."""
        return self._slices.get(service, {}).values()

    def zone(self, node: str) -> str:
        """The topology zone of a node; empty where it has none, or is not known."""
        record = self._objects[Kind.NODES].get(("", node))
        return record.zone if isinstance(record, NodeRecord) else ""

    def counts(self) -> dict[Kind, int]:
        """How many objects there are of each kind."""
        return {kind: len(objects) for kind, objects in self._objects.items()}

    def snapshot(self) -> Snapshot:
        """What is known now: the snapshot before if nothing changed since, else a new one with the next revision."""
        if not self._changed:
            return self._snapshot
        self._changed = False
        for key in self._unjoined:
            self._join(key)
        self._unjoined.clear()
        if self._endpoints_view is None:
            self._endpoints_view = JoinedEndpoints(self._endpoints.copy())
        if self._nodes_view is None:
            nodes = (node for node in self._objects[Kind.NODES].values() if isinstance(node, NodeRecord))
            self._nodes_view = MappingProxyType({node.name: node.addresses for node in nodes})
        self._snapshot = Snapshot(
            revision=self._snapshot.revision + 1,
            taken_at=self._newest,
            services=self._services.view(),
            node_ports=self._node_ports.view(),
            endpoints=self._endpoints_view,
            pods_by_ip=self._pods.view(),
            pods_by_uid=self._pods_by_uid.view(),
            nodes=self._nodes_view,
        )
        return self._snapshot

    def _refresh(self, record: Record | None) -> None:
        """Keep what is told anew of an object that is the same: an annotation that is not part of it."""
        if isinstance(record, SliceRecord):
            self._objects[record.kind][record.key] = record
            if record.service:
                self._slices[record.namespace, record.service][record.key] = record

    def _assert(self, record: Record) -> None:
        match record:
            case ServiceRecord():
                for port in record.ports:
                    rank = record.created, port.service_port
                    for ip in record.addresses:
                        address = ServiceAddress(ip, port.number, port.service_port.protocol)
                        self._services.claim(address, rank, port.service_port)
                    if port.node_port:
                        node_port = port.node_port, port.service_port.protocol
                        self._node_ports.claim(node_port, rank, port.service_port)
                self._unjoined.add(record.key)
            case SliceRecord():
                if record.service:
                    service = record.namespace, record.service
                    self._slices.setdefault(service, {})[record.key] = record
                    self._unjoined.add(service)
            case PodRecord():
                if record.owns_addresses:
                    for ip in record.pod.ips:
                        self._pods.claim(ip, _pod_rank(record), record.pod)
                if record.cgroup_uid:
                    self._pods_by_uid.claim(record.cgroup_uid, _pod_rank(record), record.pod)
            case NodeRecord():
                self._nodes_view = None

    def _retract(self, record: Record) -> None:
        match record:
            case ServiceRecord():
                for port in record.ports:
                    rank = record.created, port.service_port
                    for ip in record.addresses:
                        self._services.release(
                            ServiceAddress(ip, port.number, port.service_port.protocol), rank
                        )
                    if port.node_port:
                        self._node_ports.release((port.node_port, port.service_port.protocol), rank)
                    self._set_endpoints(port.service_port, None)
                self._unjoined.discard(record.key)
            case SliceRecord():
                if record.service:
                    service = record.namespace, record.service
                    del self._slices[service][record.key]
                    if not self._slices[service]:
                        del self._slices[service]
                    self._unjoined.add(service)
            case PodRecord():
                for ip in record.pod.ips if record.owns_addresses else ():
                    self._pods.release(ip, _pod_rank(record))
                if record.cgroup_uid:
                    self._pods_by_uid.release(record.cgroup_uid, _pod_rank(record))
            case NodeRecord():
                self._nodes_view = None

    def _join(self, key: Name) -> None:
        """Give every port of one Service the endpoints that its slices have for it."""
        service = self._objects[Kind.SERVICES].get(key)
        if not isinstance(service, ServiceRecord):
            return
        slices = self._slices.get(key, {})
        for port in service.ports:
            wanted = port.name, port.service_port.protocol
            self._set_endpoints(port.service_port, with_endpoints(wanted, slices.values()))

    def _set_endpoints(self, port: ServicePort, sources: Sources | None) -> None:
        if sources == self._endpoints.get(port):
            return
        if sources:
            self._endpoints[port] = sources
        else:
            del self._endpoints[port]
        self._by_address.changed(port)
        self._endpoints_view = None


def _pod_rank(record: PodRecord) -> tuple[bool, int, Pod]:
    """A pod that stays before one that leaves, then the youngest: it was given the address last."""
    return record.leaving, -record.created, record.pod
