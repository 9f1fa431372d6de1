# SPDX-License-Identifier: Apache-2.0

import json

import yaml

from kptrace.experiments.manifests import identity_text, objects
from kptrace.experiments.services import make_services
from kptrace.identity.objects import decode
from kptrace.identity.records import Kind, ServiceRecord
from kptrace.model.netfilter import IpFamily


def test_the_identity_file_is_json_and_yaml_alike() -> None:
    """What is written can be read as either."""
    text = identity_text(make_services(3))
    assert json.loads(text) == yaml.safe_load(text)
    assert json.loads(text)["kind"] == "List"


def test_every_address_and_endpoint_is_named() -> None:
    """Each Service has its address and port, and its slices hold all its endpoints."""
    services = make_services(4, 3)
    found = objects(services)
    named = {one["metadata"]["name"]: one for one in found if one["kind"] == "Service"}
    for service in services:
        spec = named[service.port.name]["spec"]
        assert spec["clusterIP"] == service.address.ip
        assert [(port["name"], port["port"], port["protocol"]) for port in spec["ports"]] == [
            ("http", 80, "TCP")
        ]
        slices = [
            one
            for one in found
            if one["kind"] == "EndpointSlice"
            and one["metadata"]["labels"]["kubernetes.io/service-name"] == service.port.name
        ]
        addresses = [endpoint["addresses"][0] for one in slices for endpoint in one["endpoints"]]
        assert addresses == [endpoint.ip for endpoint in service.endpoints]


def test_two_families_of_one_name_are_one_service() -> None:
    """A dual-stack Service is one object with two addresses, and has a slice in each family."""
    services = [service for family in IpFamily for service in make_services(1, family=family)]
    found = objects(services)
    assert [one["kind"] for one in found] == ["Service", "EndpointSlice", "EndpointSlice"]
    assert found[0]["spec"]["clusterIPs"] == [service.address.ip for service in services]
    assert found[0]["spec"]["ipFamilies"] == ["IPv4", "IPv6"]
    assert len(found[0]["spec"]["ports"]) == 1


def test_an_external_address_is_that_of_a_load_balancer() -> None:
    """A Service with one is of type LoadBalancer, and kptrace reads both of its addresses from the file."""
    services = make_services(4, external_every=3)
    found = [one for one in objects(services) if one["kind"] == "Service"]
    assert [one["spec"]["type"] for one in found] == [
        "LoadBalancer",
        "ClusterIP",
        "ClusterIP",
        "LoadBalancer",
    ]
    records = [decode(Kind.SERVICES, one) for one in found]
    assert [record.addresses for record in records if isinstance(record, ServiceRecord)] == [
        tuple(address.ip for address in service.addresses) for service in services
    ]


def test_a_slice_holds_at_most_a_hundred_endpoints() -> None:
    """Many endpoints are spread over slices with names of their own."""
    slices = [one for one in objects(make_services(1, 250)) if one["kind"] == "EndpointSlice"]
    assert [len(one["endpoints"]) for one in slices] == [100, 100, 50]
    assert len({one["metadata"]["name"] for one in slices}) == 3
