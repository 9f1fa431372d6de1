# SPDX-License-Identifier: Apache-2.0
from hypothesis import given
from hypothesis import strategies as st

from kptrace.identity import addresses
from kptrace.identity.records import Kind, PortRecord, ServiceRecord, SliceRecord
from kptrace.identity.store import Gone, Store
from kptrace.model.identity import Endpoint, Protocol, ServicePort

SERVICES = ["a", "b", "c"]
IPS = ["10.1.0.1", "10.1.0.2", "10.1.0.3", "fd00::1"]


def port(name: str) -> ServicePort:
    """The one port of a Service."""
    return ServicePort("ns", name, "http", Protocol.TCP)


def slice_of(name: str, ips: list[str]) -> SliceRecord:
    """The one slice of a Service."""
    ends = tuple(Endpoint(ip, 8080) for ip in ips)
    return SliceRecord("ns", name, name, ((("http", Protocol.TCP), ends),))


def filled() -> Store:
    """Services without endpoints."""
    store = Store()
    for number, name in enumerate(SERVICES):
        ports = (PortRecord(port(name), "http", 80),)
        store.apply(ServiceRecord("ns", name, 1, ports, (f"10.96.0.{number}",), 1))
    return store


changes = st.tuples(
    st.sampled_from(SERVICES), st.lists(st.sampled_from(IPS), max_size=3, unique=True), st.booleans()
)


@given(st.lists(changes, max_size=20), st.integers(0, 4))
def test_addresses_lead_to_the_endpoints_that_there_are(
    history: list[tuple[str, list[str], bool]], most: int
) -> None:
    """Whatever came and went, and whenever somebody asked, an address has exactly its present endpoints."""
    before, addresses._MOST_RECENT = addresses._MOST_RECENT, most
    try:
        store = filled()
        now: dict[str, list[str]] = {name: [] for name in SERVICES}
        for name, ips, ask in history:
            store.apply(slice_of(name, ips) if ips else Gone(Kind.ENDPOINT_SLICES, ("ns", name)))
            store.snapshot()
            now[name] = ips
            for ip in IPS if ask else ():
                found = store.endpoints_at(ip)
                assert found == {port(each): (Endpoint(ip, 8080),) for each in SERVICES if ip in now[each]}
    finally:
        addresses._MOST_RECENT = before


def test_checksums_that_are_equal_do_no_harm() -> None:
    """Two addresses of one CRC-32 are two addresses."""
    store = filled()
    same = {"plumless": "buckeroo"}  # a well-known pair; what is stored need not look like an address
    for name, ip in zip(SERVICES, [*same, *same.values()], strict=False):
        store.apply(slice_of(name, [ip]))
    store.snapshot()
    assert list(store.endpoints_at("plumless")) == [port("a")]
    assert list(store.endpoints_at("buckeroo")) == [port("b")]
