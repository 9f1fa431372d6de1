# SPDX-License-Identifier: Apache-2.0
"""Entries of Cilium's service and back end maps, from bytes and back."""

import ipaddress
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kptrace.dataplanes.cilium.layout_table import LAYOUTS
from kptrace.dataplanes.cilium.layouts import Layout, Role
from kptrace.dataplanes.cilium.service_map import (
    Backend,
    BackendState,
    ServiceFlag,
    ServiceKey,
    ServiceValue,
    decode_backend,
    decode_backend_id,
    decode_service_key,
    decode_service_value,
    encode_backend,
    encode_backend_id,
    encode_service_key,
    encode_service_value,
)
from kptrace.experiments import cilium_entries as entries
from kptrace.model.identity import Protocol, ServiceAddress

SERVICES = [each for each in LAYOUTS if each.role in (Role.LB4_SERVICES, Role.LB6_SERVICES)]
BACKENDS = [each for each in LAYOUTS if each.role in (Role.LB4_BACKENDS, Role.LB6_BACKENDS)]
U8, U16, U32 = (st.integers(0, 2**bits - 1) for bits in (8, 16, 32))


def ips(layout: Layout) -> st.SearchStrategy[str]:
    """Addresses of a map's family, in text form."""
    return st.ip_addresses(v=6 if "6" in layout.role else 4).map(str)


@given(st.data())
def test_service_keys_and_values_survive_both_ways(data: st.DataObject) -> None:
    """Every member has a place of its own, and IPv6 addresses one text form."""
    layout = data.draw(st.sampled_from(SERVICES))
    key = ServiceKey(*(data.draw(each) for each in (ips(layout), U16, U8, U16, U8)))
    decoded = decode_service_key(layout, encode_service_key(layout, key))
    assert ipaddress.ip_address(decoded.ip) == ipaddress.ip_address(key.ip)
    assert decoded == key._replace(ip=decoded.ip)
    value = ServiceValue(*(data.draw(each) for each in (U16, U32, U16, U16, U16)))
    assert decode_service_value(layout, encode_service_value(layout, value)) == value


@given(st.data())
def test_back_ends_survive_both_ways(data: st.DataObject) -> None:
    """In all four layouts; what a version has behind the state stays 0."""
    layout = data.draw(st.sampled_from(BACKENDS))
    backend = Backend(*(data.draw(each) for each in (ips(layout), U16, U8, U8)))
    encoded = encode_backend(layout, backend)
    decoded = decode_backend(layout, encoded)
    assert ipaddress.ip_address(decoded.ip) == ipaddress.ip_address(backend.ip)
    assert decoded == backend._replace(ip=decoded.ip)
    number = data.draw(U32)
    assert decode_backend_id(layout, encode_backend_id(layout, number)) == number


@given(st.data())
def test_bytes_are_those_of_the_experiments_agent(data: st.DataObject) -> None:
    """Two tellings of Cilium's structures make the same bytes."""
    services, backends = data.draw(st.sampled_from([(SERVICES[0], BACKENDS[0]), (SERVICES[1], BACKENDS[2])]))
    assert services.role[:3] == backends.role[:3]
    ip, port = data.draw(ips(services)), data.draw(U16)
    protocol = data.draw(st.sampled_from(Protocol))
    slot, service, count, inactive = (data.draw(U16) for _ in range(4))
    key = entries.service_key(ServiceAddress(ip, port, protocol), slot, protocol=True)
    assert encode_service_key(services, ServiceKey(ip, port, protocol, slot)) == key
    value = entries.service_value(service, backend=7, count=count, inactive=inactive, flags=32)
    assert (
        encode_service_value(
            services, ServiceValue(count, 7, ServiceFlag.LOADBALANCER, service, inactive=inactive)
        )
        == value
    )
    assert backends.value is not None
    written = entries.backend_value(ip, port, protocol, entries.TERMINATING, backends.value.size)
    assert encode_backend(backends, Backend(ip, port, protocol, BackendState.TERMINATING)) == written


def test_both_bytes_of_flags_are_one_number() -> None:
    """The second byte is in the higher bits, whatever the machine's byte order."""
    data = bytearray(12)
    data[8], data[9] = 0x02, 0x20
    value = decode_service_value(SERVICES[0], bytes(data))
    assert value.flags == ServiceFlag.NODEPORT | ServiceFlag.TWO_SCOPES


def test_entries_of_another_size_are_refused() -> None:
    """A copy that was cut is not decoded to nonsense."""
    services, backends = SERVICES[0], BACKENDS[0]
    for decode, layout in (
        (decode_service_key, services),
        (decode_service_value, services),
        (decode_backend_id, backends),
        (decode_backend, backends),
    ):
        with pytest.raises(ValueError, match="11 bytes where the layout has"):
            decode(layout, bytes(11))


def test_maps_whose_contents_are_not_known_are_not_decoded() -> None:
    """A layout may know how long the keys are, and no more."""
    with pytest.raises(ValueError, match="not known"):
        decode_backend(replace(BACKENDS[0], value=None), bytes(12))
