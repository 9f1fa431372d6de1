# SPDX-License-Identifier: Apache-2.0
import time
from dataclasses import fields
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from kptrace.identity.records import (
    Kind,
    NodeRecord,
    PodRecord,
    PortRecord,
    Record,
    ServiceRecord,
    SliceRecord,
)
from kptrace.identity.store import Event, Gone, Store
from kptrace.model.identity import Endpoint, Pod, Protocol, ServiceAddress, ServicePort, Snapshot

TCP, UDP = Protocol.TCP, Protocol.UDP


def service(
    name: str, created: int = 1, ips: tuple[str, ...] = ("10.0.0.1",), node_port: int = 0
) -> ServiceRecord:
    """A Service `ns/NAME` with the port 80 named http."""
    port = PortRecord(ServicePort("ns", name, "http", TCP), "http", 80, node_port)
    return ServiceRecord("ns", name, created, (port,), ips)


def slice_of(service_name: str, name: str, *endpoints: Endpoint) -> SliceRecord:
    """An EndpointSlice of a Service's port http."""
    return SliceRecord("ns", name, service_name, ((("http", TCP), endpoints),))


def pod(name: str, ip: str, created: int = 1, *, leaving: bool = False, owns: bool = True) -> PodRecord:
    """A pod with one address."""
    return PodRecord(Pod("ns", name, name, "n", (ip,)), created, leaving, owns)


def contents(snapshot: Snapshot) -> dict[str, Any]:
    """Everything in a snapshot but when it was made."""
    names = {field.name for field in fields(Snapshot)} - {"revision", "taken_at"}
    return {name: dict(getattr(snapshot, name)) for name in names}


def made_of(*events: Event) -> Snapshot:
    """The snapshot after these events."""
    store = Store()
    for event in events:
        store.apply(event)
    return store.snapshot()


def test_a_service_is_found_by_address_and_node_port() -> None:
    """Every address with every port leads to the Service port; so does the node port."""
    snapshot = made_of(service("web", ips=("10.0.0.1", "fd00::1"), node_port=30080))
    web = ServicePort("ns", "web", "http", TCP)
    assert snapshot.services == {
        ServiceAddress("10.0.0.1", 80, TCP): web,
        ServiceAddress("fd00::1", 80, TCP): web,
    }
    assert snapshot.node_ports == {(30080, TCP): web}
    assert snapshot.endpoints == {}


def test_endpoints_join_their_service_in_any_order() -> None:
    """Slices may come before their Service, several make one list, and they go with the Service."""
    first, second = Endpoint("10.1.0.1", 8080), Endpoint("10.1.0.2", 8080)
    web = ServicePort("ns", "web", "http", TCP)
    store = Store()
    store.apply(slice_of("web", "b", second))
    assert store.snapshot().endpoints == {}
    store.apply(service("web"))
    store.apply(slice_of("web", "a", first))
    assert store.snapshot().endpoints == {web: (first, second)}
    store.apply(Gone(Kind.ENDPOINT_SLICES, ("ns", "b")))
    assert store.snapshot().endpoints == {web: (first,)}
    store.apply(Gone(Kind.SERVICES, ("ns", "web")))
    assert store.snapshot().endpoints == {}


def test_an_endpoint_in_two_slices_counts_once_as_the_readier() -> None:
    """While an endpoint moves between slices, the ready copy counts."""
    stale, live = Endpoint("10.1.0.1", 8080, ready=False), Endpoint("10.1.0.1", 8080)
    snapshot = made_of(service("web"), slice_of("web", "a", live), slice_of("web", "b", stale))
    assert tuple(snapshot.endpoints.values()) == ((live,),)


def test_the_older_of_two_services_owns_an_address() -> None:
    """A claimed address stays with the older Service, then the first by name, and passes on when that goes."""
    address = ServiceAddress("10.0.0.1", 80, TCP)
    store = Store()
    for record in (service("young", 9), service("b", 5), service("a", 5)):
        store.apply(record)
    assert store.snapshot().services[address].name == "a"
    store.apply(Gone(Kind.SERVICES, ("ns", "a")))
    assert store.snapshot().services[address].name == "b"
    store.apply(Gone(Kind.SERVICES, ("ns", "b")))
    assert store.snapshot().services[address].name == "young"


def test_the_youngest_pod_that_stays_owns_an_address() -> None:
    """Addresses of pods are reused: the pod that got it last owns it, never one that has ended."""
    leaving, old, young, ended = (
        pod("leaving", "10.1.0.1", 9, leaving=True),
        pod("old", "10.1.0.1", 1),
        pod("young", "10.1.0.1", 5),
        pod("ended", "10.1.0.1", 7, owns=False),
    )
    assert made_of(young, leaving, old, ended).pods_by_ip == {"10.1.0.1": young.pod}
    assert made_of(leaving).pods_by_ip == {"10.1.0.1": leaving.pod}


def test_only_a_change_makes_a_new_snapshot_and_the_rest_is_shared() -> None:
    """The same object again changes nothing; a new node leaves the mapping of Services the very same object."""
    store = Store()
    assert store.apply(service("web"), at=1.0)
    first = store.snapshot()
    assert not store.apply(service("web"), at=2.0)
    assert store.snapshot() is first
    assert store.apply(NodeRecord("n", ("172.18.0.2",)), at=3.0)
    second = store.snapshot()
    assert (first.revision, first.taken_at, second.revision, second.taken_at) == (1, 1.0, 2, 3.0)
    assert second.services is first.services
    assert (first.nodes, second.nodes) == ({}, {"n": ("172.18.0.2",)})


def test_replace_removes_what_is_no_longer_listed() -> None:
    """A list is all there is: what it lacks is gone."""
    store = Store()
    store.replace(Kind.SERVICES, [service("a"), service("b", ips=("10.0.0.2",))])
    assert store.replace(Kind.SERVICES, [service("b", ips=("10.0.0.2",))])
    assert [port.name for port in store.snapshot().services.values()] == ["b"]
    assert store.counts()[Kind.SERVICES] == 1
    assert not store.replace(Kind.SERVICES, [service("b", ips=("10.0.0.2",))])


# Few names and addresses, so that objects collide and are replaced often.
names = st.sampled_from("abc")
addresses = st.lists(st.sampled_from(["10.0.0.1", "10.0.0.2", "fd00::1"]), unique=True, max_size=3).map(tuple)
ports = st.builds(
    lambda service_name, text, protocol, number, node_port: PortRecord(
        ServicePort("ns", service_name, text, protocol), text, number, node_port
    ),
    names,
    st.sampled_from(["http", "dns"]),
    st.sampled_from([TCP, UDP]),
    st.sampled_from([53, 80]),
    st.sampled_from([0, 30080]),
)
services = st.builds(
    lambda name, created, found, ips: ServiceRecord(
        "ns",
        name,
        created,
        tuple(
            PortRecord(
                ServicePort("ns", name, port.name, port.service_port.protocol),
                port.name,
                port.number,
                port.node_port,
            )
            for port in found
        ),
        ips,
    ),
    names,
    st.integers(1, 2),
    st.lists(ports, max_size=3),
    addresses,
)
endpoints = st.builds(Endpoint, st.sampled_from(["10.1.0.1", "10.1.0.2"]), st.just(8080), ready=st.booleans())
slices = st.builds(
    lambda name, owner, ends: SliceRecord("ns", name, owner, ((("http", TCP), tuple(ends)),)),
    names,
    st.sampled_from(["", "a", "b", "c"]),
    st.lists(endpoints, max_size=3),
)
pods = st.builds(
    lambda name, ip, created, leaving, owns: pod(name, ip, created, leaving=leaving, owns=owns),
    names,
    st.sampled_from(["10.1.0.1", "10.1.0.2"]),
    st.integers(1, 2),
    st.booleans(),
    st.booleans(),
)
nodes = st.builds(NodeRecord, names, addresses)
records: st.SearchStrategy[Record] = services | slices | pods | nodes
gone = st.builds(
    lambda kind, name: Gone(kind, ("" if kind is Kind.NODES else "ns", name)), st.sampled_from(Kind), names
)
events: st.SearchStrategy[Event] = records | gone


@given(
    history=st.lists(st.tuples(events, st.booleans()), max_size=40),
    shuffled=st.randoms(use_true_random=False),
)
def test_any_history_of_the_same_objects_gives_the_same_snapshot(
    history: list[tuple[Event, bool]], shuffled: Any
) -> None:
    """Only what exists at the end counts, not the order in which it came, nor the snapshots taken on the way."""
    store = Store()
    alive: dict[tuple[Kind, tuple[str, str]], Record] = {}
    for event, look in history:
        store.apply(event)
        if isinstance(event, Gone):
            alive.pop((event.kind, event.key), None)
        else:
            alive[event.kind, event.key] = event
        if look:
            store.snapshot()
    expected = contents(store.snapshot())
    remaining = list(alive.values())
    shuffled.shuffle(remaining)
    assert contents(made_of(*remaining)) == expected
    listed = Store()
    for kind in Kind:
        listed.replace(kind, [record for record in remaining if record.kind is kind])
    assert contents(listed.snapshot()) == expected
    for record in remaining:
        store.apply(Gone(record.kind, record.key))
    assert contents(store.snapshot()) == contents(Snapshot())


def test_ten_thousand_services_are_quick_and_one_change_is_quicker() -> None:
    """10,000 Services of two endpoints take well under a second each time; one change takes a small part of that."""
    many: list[Record] = []
    for index in range(10_000):
        name, high, low = f"s{index}", index // 256, index % 256
        many.append(service(name, ips=(f"10.96.{high}.{low}",)))
        ends = (Endpoint(f"10.1.{high}.{low}", 8080), Endpoint(f"10.2.{high}.{low}", 8080))
        many.append(slice_of(name, name, *ends))
    store = Store()
    begin = time.process_time()
    for record in many:
        store.apply(record)
    assert len(store.snapshot().endpoints) == 10_000
    whole = time.process_time() - begin
    rounds = 5
    begin = time.process_time()
    for index in range(rounds):
        store.apply(slice_of("s7", "s7", Endpoint("10.3.0.1", 8080 + index)))
        store.snapshot()
    assert (time.process_time() - begin) / rounds < whole / 5
    assert whole < 1.0 * 3
