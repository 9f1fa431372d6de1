# SPDX-License-Identifier: Apache-2.0

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kptrace.experiments.services import PLANS, change_endpoint, make_services
from kptrace.model.netfilter import IpFamily

FAMILIES = st.sampled_from(IpFamily)


@given(st.integers(1, 200), st.integers(0, 5), st.integers(0, 500), FAMILIES)
def test_services_and_endpoints_are_distinct_and_in_their_ranges(
    count: int, endpoints: int, first: int, family: IpFamily
) -> None:
    """Every Service and endpoint has an address of its own, inside the range that the node routes."""
    services = make_services(count, endpoints, family=family, first=first)
    plan = PLANS[family]
    addresses = [service.address.ip for service in services]
    backends = [endpoint.ip for service in services for endpoint in service.endpoints]
    assert len(set(addresses)) == count
    assert len(set(backends)) == count * endpoints
    assert all(ipaddress.ip_address(ip) in plan.services for ip in addresses)
    assert all(ipaddress.ip_address(ip) in plan.backends for ip in backends)
    assert all(service.family is family for service in services)


@given(st.integers(0, 1000), st.integers(0, 1000), FAMILIES)
def test_a_changed_endpoint_is_new_for_every_step(one: int, other: int, family: IpFamily) -> None:
    """Changing an endpoint replaces the first by an address that neither another step nor a new Service has."""
    (service,) = make_services(1, 3, family=family)
    changed = [change_endpoint(service, step).endpoints for step in (one, other)]
    assert all(endpoints[1:] == service.endpoints[1:] for endpoints in changed)
    assert (changed[0][0].ip == changed[1][0].ip) == (one == other)
    taken = {e.ip for s in make_services(100, 3, family=family) for e in s.endpoints}
    assert changed[0][0].ip not in taken
    assert ipaddress.ip_address(changed[0][0].ip) in PLANS[family].backends


@given(st.integers(0, 60), st.integers(0, 5), st.integers(0, 50), FAMILIES)
def test_every_nth_service_has_an_external_address(
    count: int, every: int, first: int, family: IpFamily
) -> None:
    """Multiples of N have an address of their own in the external range at the same port; with 0 none has."""
    services = make_services(count, family=family, first=first, external_every=every)
    found = [service.external for service in services if service.external is not None]
    assert len({address.ip for address in found}) == len(found)
    assert all(ipaddress.ip_address(address.ip) in PLANS[family].external for address in found)
    with_one = [number for number in range(first, first + count) if every and number % every == 0]
    assert [int(service.port.name[-5:]) for service in services if service.external is not None] == with_one
    assert all(
        service.addresses == (service.address, *([service.external] if service.external else []))
        for service in services
    )


def test_the_same_numbers_in_two_families_are_the_same_services() -> None:
    """An IPv4 and an IPv6 set of the same numbers name the same Service ports."""
    both = [[service.port for service in make_services(5, family=family)] for family in IpFamily]
    assert both[0] == both[1]


def test_more_than_the_ranges_hold_is_refused() -> None:
    """Asking for more Services or endpoints than there are addresses is an error, not a wrap-around."""
    with pytest.raises(ValueError, match="endpoints"):
        make_services(10_000, 14)
    with pytest.raises(ValueError, match="Services"):
        make_services(65_536, 1)
    assert len(make_services(10_000, 12)) == 10_000
