# SPDX-License-Identifier: Apache-2.0
"""Service ports in kube-proxy's nftables batches: bytes of nft itself, and messages built by hand."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kptrace.dataplanes.nftables.service_names import ChainName, parse_chain
from kptrace.dataplanes.nftables.services import ServiceBatch, decode_services, touched_service_ports
from kptrace.dataplanes.service_index import ServiceIndex, name_hash
from kptrace.dataplanes.told import EVERYTHING
from kptrace.model.identity import Protocol, ServiceAddress, ServicePort
from kptrace.model.netfilter import IpFamily
from tests.unit.dataplanes.captured import captured
from tests.unit.dataplanes.wire import attribute, batch, name, nft, number

TCP, UDP = Protocol.TCP, Protocol.UDP
WEB = ServicePort("demo", "web", "http", TCP)
API = ServicePort("demo", "api", "https", TCP)
BARE = ServicePort("demo", "noep", "dns", UDP)
UNNAMED = ServicePort("demo", "plain", "80", TCP)
TABLE = name(1, "kube-proxy")
NEWTABLE, NEWCHAIN, DELCHAIN, NEWRULE, DELRULE, NEWSETELEM, DELSETELEM = 0, 3, 5, 6, 8, 12, 14


def one(data: bytes, size: int | None = None) -> ServiceBatch:
    """What a batch of one family says."""
    (found,) = decode_services(data, size)
    return found


def chain_of(kind: str, text: str) -> str:
    """A chain's name."""
    return f"{kind}-{name_hash(text, 8)}-{text}"


def add_chain(kind: str, text: str, operation: int = NEWCHAIN) -> bytes:
    """NEWCHAIN or DELCHAIN."""
    return nft(operation, TABLE, name(3, chain_of(kind, text)))


def flush(kind: str, text: str) -> bytes:
    """DELRULE of a whole chain."""
    return nft(DELRULE, TABLE, name(2, chain_of(kind, text)))


def element(operation: int, set_name: str, key: bytes) -> bytes:
    """One element of a named map, by key."""
    listed = attribute(0x8003, attribute(0x8001, attribute(0x8001, attribute(1, key))))
    return nft(operation, TABLE, name(2, set_name), listed)


def service_key(ip: str, port: int, protocol: int = 6) -> bytes:
    """An IPv4 address, protocol and port as in service-ips."""
    return bytes(int(part) for part in ip.split(".")) + bytes([protocol, 0, 0, 0]) + struct.pack("!H2x", port)


def index_of(*ports: ServicePort) -> ServiceIndex:
    """An index of Service ports at 10.96.10.1 and following."""
    index = ServiceIndex()
    for place, port in enumerate(ports, 1):
        index.add(port, [ServiceAddress(f"10.96.10.{place}", 80, port.protocol)], 30079 + place)
    return index


def test_a_service_port_that_changed_tells_its_endpoints_and_addresses() -> None:
    """Chain names, the anonymous map of the rule, the keys of maps and the comment of an address without endpoints."""
    told = one(captured("nft_endpoints"))
    assert told.family is IpFamily.IPV4
    assert touched_service_ports(told, ServiceIndex()) == {WEB, BARE}
    assert told.touches(WEB, bare=False)
    assert told.touches(API, bare=False) is False
    assert told.endpoint(WEB, "10.244.1.11", 8080)
    assert told.endpoint(WEB, "10.244.2.12", 8081)
    assert told.endpoint(WEB, "10.244.1.11", 8081) is False
    assert told.endpoint(API, "10.244.1.11", 8080) is None
    assert told.endpoint(BARE, "10.244.1.11", 8080) is False
    assert told.present(WEB)
    assert told.present(BARE)
    assert told.present(API) is None
    assert told.address(WEB, "10.96.10.1", 80)
    assert told.address(WEB, "", 30080)
    assert told.address(BARE, "10.96.10.3", 53)
    assert told.address(API, "10.96.10.9", 80) is None


def test_with_session_affinity_endpoints_are_chains() -> None:
    """The map of a policy chain leads to chains whose names have the endpoint."""
    told = one(captured("nft_affinity"))
    assert told.endpoint(API, "10.244.1.21", 8443)
    assert told.endpoint(API, "10.244.1.22", 8443) is False
    assert touched_service_ports(told, ServiceIndex()) == {API}


def test_ipv6_keys_and_endpoints() -> None:
    """Addresses of sixteen bytes; the batch adds the table, so it is a full sync, which carries everything."""
    told = one(captured("nft_ipv6"))
    assert told.family is IpFamily.IPV6
    assert told.full
    assert touched_service_ports(told, ServiceIndex()) is EVERYTHING
    assert told.touches(WEB, bare=False) is None
    assert told.endpoint(WEB, "fd00:244::1", 8080)
    assert told.endpoint(WEB, "fd00:244::2", 8080) is False
    assert told.endpoint(API, "fd00:244::2", 8080) is False
    assert told.address(WEB, "fd00:96::1", 80)
    assert told.address(WEB, "fd00:96::2", 80) is None
    assert told.present(API) is None


def test_a_service_port_that_lost_its_last_endpoint_is_named_by_the_comment() -> None:
    """Its chain is only flushed; its address moves to the map of those without endpoints."""
    told = one(captured("nft_last_endpoint"))
    assert told.touches(WEB, bare=True)
    assert told.endpoint(WEB, "10.244.1.11", 8080) is False
    assert told.address(WEB, "10.96.10.1", 80)
    assert told.address(WEB, "", 30080) is False
    assert touched_service_ports(told, index_of(WEB)) == {WEB}


def test_chains_that_are_given_up_say_nothing() -> None:
    """They are flushed with every sync, and deleted by a transaction of their own."""
    given_up = flush("local", "demo/web/tcp/http"), add_chain("service", "demo/web/tcp/http", DELCHAIN)
    assert decode_services(batch(*given_up)) == ()
    told = one(batch(*given_up, add_chain("service", "demo/api/tcp/https")))
    assert told.touches(WEB, bare=False) is False


def test_a_service_that_is_gone_is_told_by_its_keys() -> None:
    """Whether it had endpoints or not."""
    for place in ("service-ips", "no-endpoint-services"):
        told = one(batch(element(DELSETELEM, place, service_key("10.96.10.1", 80))))
        assert told.address(WEB, "10.96.10.1", 80) is False
        assert touched_service_ports(told, index_of(WEB)) == {WEB}
        assert touched_service_ports(told, ServiceIndex()) == frozenset()


def test_a_first_local_endpoint_leaves_the_address_where_it_is() -> None:
    """With policy Local an address is in both maps while no endpoint is on this node."""
    told = one(
        batch(
            add_chain("local", "demo/web/tcp/http"),
            element(DELSETELEM, "no-endpoint-services", service_key("10.96.10.1", 80)),
        )
    )
    assert told.address(WEB, "10.96.10.1", 80) is True


@pytest.mark.parametrize(
    "places", [("service-ips", "no-endpoint-services"), ("no-endpoint-services", "service-ips")]
)
@pytest.mark.parametrize("added_first", [False, True])
def test_an_address_that_moves_between_maps_stays(places: tuple[str, str], added_first: bool) -> None:
    """In whatever order the batch has it."""
    key = service_key("10.96.10.1", 80)
    moves = [element(DELSETELEM, places[0], key), element(NEWSETELEM, places[1], key)]
    assert one(batch(*(moves[::-1] if added_first else moves))).address(WEB, "10.96.10.1", 80) is True


def test_a_cut_copy_may_carry_anything_but_what_it_shows_is_there() -> None:
    """The first rules are read; nothing is ruled out."""
    data = captured("nft_endpoints")
    told = one(data[:900], len(data))
    assert told.truncated
    assert touched_service_ports(told, index_of(WEB)) is EVERYTHING
    assert told.touches(API, bare=False) is None
    assert told.endpoint(WEB, "10.244.1.99", 8080) is None
    assert one(data, len(data) + 1).endpoint(WEB, "10.244.1.11", 8080) is True


def test_a_cut_copy_tells_who_is_not_in_rules_that_are_whole() -> None:
    """All policy chains of a Service port are added before the rules of one are written."""
    text = "demo/web/tcp/http"
    rule = nft(NEWRULE, TABLE, name(2, chain_of("service", text)))
    other = add_chain("service", "demo/api/tcp/https")
    for chains, expected in ((("service",), False), (("service", "local"), None)):
        data = batch(*(add_chain(kind, text) for kind in chains), rule, other, end=False)
        told = one(data, len(data) + 1)
        assert told.truncated
        assert told.endpoint(WEB, "10.244.1.11", 8080) is expected
        assert told.endpoint(API, "10.244.1.11", 8443) is None
    told = one(batch(add_chain("service", text), add_chain("local", text), rule, end=False), 1000)
    assert told.endpoint(WEB, "10.244.1.11", 8080) is None


def test_a_port_without_a_name_is_the_services_only_one() -> None:
    """kube-proxy's name for it is empty; ours is its number, which may be a name as well."""
    for text in ("demo/plain/tcp/", "demo/plain/tcp/80"):
        told = one(batch(add_chain("service", text)))
        assert told.touches(UNNAMED, bare=False)
        assert touched_service_ports(told, index_of(UNNAMED)) == {UNNAMED}
    assert (
        touched_service_ports(one(batch(add_chain("service", "demo/plain/tcp/"))), ServiceIndex())
        == frozenset()
    )


def test_a_chain_of_another_hash_is_not_kube_proxys() -> None:
    """Anybody can write the clear text; also other tables are nobody's Service."""
    assert parse_chain(chain_of("service", "demo/web/tcp/http")) == ChainName("service", "demo/web/tcp/http")
    assert parse_chain("service-AXK6CI2C-demo/web/tcp/http") is not None
    assert parse_chain("service-AXK6CI2D-demo/web/tcp/http") is None
    assert parse_chain("reject-chain") is None
    assert parse_chain(chain_of("service", "demo/web/tcp/http__10.0.0.1/80")) is None
    assert parse_chain(chain_of("endpoint", "demo/web/tcp/http__fd00..1/80")) == ChainName(
        "endpoint", "demo/web/tcp/http", ("fd00::1", 80)
    )
    assert parse_chain(chain_of("endpoint", "demo/web/tcp/http__1.2.3/80")) is None
    assert parse_chain("endpoint-XIIPJ3GB-demo/api/tcp/https__10.244.1.21/8443") is not None
    assert (
        decode_services(batch(nft(NEWCHAIN, name(1, "other"), name(3, "service-AXK6CI2C-demo/web/tcp/http"))))
        == ()
    )


def test_an_affinity_chain_whose_name_is_cut_leaves_the_endpoints_open() -> None:
    """Names of more than 240 bytes end in dots."""
    verdict = attribute(
        0x8002, attribute(0x8002, number(1, 0xFFFFFFFC) + name(2, "endpoint-AAAAAAAA-demo..."))
    )
    listed = attribute(0x8003, attribute(0x8001, verdict))
    told = one(
        batch(
            add_chain("service", "demo/api/tcp/https"),
            nft(NEWSETELEM, TABLE, name(2, "__map%d"), listed),
            nft(NEWRULE, TABLE, name(2, chain_of("service", "demo/api/tcp/https"))),
        )
    )
    assert told.endpoint(API, "10.0.0.1", 80) is None


def test_the_index_finds_a_service_port_that_is_gone_for_a_while() -> None:
    """The commit that takes its rules away comes after the event."""
    index = index_of(WEB, UNNAMED)
    index.remove(WEB)
    assert len(index) == 1
    assert index.at(("10.96.10.1", 80, TCP)) == WEB
    assert index.hashed("XRY76EGRC3BSCIIJ") == WEB
    assert index.named("demo", "plain", "", TCP) == UNNAMED
    for count in range(1024):
        other = ServicePort("x", f"s{count}", "p", TCP)
        index.add(other, [ServiceAddress("10.97.0.1", count + 1, TCP)])
        index.remove(other)
    assert index.at(("10.96.10.1", 80, TCP)) is None
    assert index.hashed("XRY76EGRC3BSCIIJ") is None
    assert len(index) == 1


def test_the_index_follows_addresses() -> None:
    """An address that a Service port loses is its no more, and may be another's."""
    index = index_of(WEB, API)
    index.add(WEB, [ServiceAddress("10.96.10.2", 80, TCP)])
    assert index.at(("10.96.10.1", 80, TCP)) is None
    assert index.at(("", 30080, TCP)) is None
    assert index.at(("10.96.10.2", 80, TCP)) == WEB
    index.add(API, [ServiceAddress("10.96.10.1", 80, TCP)])
    assert index.at(("10.96.10.2", 80, TCP)) == WEB
    assert index.at(("10.96.10.1", 80, TCP)) == API


@given(st.binary(max_size=200), st.integers(0, 900))
def test_any_bytes_are_answered(noise: bytes, place: int) -> None:
    """A writer's buffer is anybody's: nothing raises."""
    for data in (noise, batch(noise), (whole := captured("nft_endpoints"))[:place] + noise + whole[place:]):
        for told in decode_services(data):
            touched_service_ports(told, index_of(WEB))
            told.endpoint(WEB, "10.244.1.11", 8080)
