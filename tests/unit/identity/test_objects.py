# SPDX-License-Identifier: Apache-2.0
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kptrace.identity.fields import NEWEST, ObjectError
from kptrace.identity.objects import decode, kind_of
from kptrace.identity.records import Kind, NodeRecord, PodRecord, ServiceRecord, SliceRecord
from kptrace.model.identity import Endpoint, Protocol, ServicePort


def service(
    spec: dict[str, Any], *, labels: dict[str, str] | None = None, status: Any = None
) -> ServiceRecord:
    """The record of a Service `ns/web` with this specification."""
    raw = {"metadata": {"name": "web", "namespace": "ns", "labels": labels}, "spec": spec, "status": status}
    record = decode(Kind.SERVICES, raw)
    assert isinstance(record, ServiceRecord)
    return record


PORTS = [{"port": 80}]


def test_dual_stack_external_and_balancer_addresses_count_once_each() -> None:
    """A Service is reached at its cluster IPs, its external IPs and its load balancer's, unless that proxies."""
    record = service(
        {
            "clusterIP": "10.0.0.1",
            "clusterIPs": ["10.0.0.1", "FD00:0::1"],
            "externalIPs": ["192.0.2.1", "192.0.2.2"],
            "ports": PORTS,
        },
        status={
            "loadBalancer": {"ingress": [{"ip": "192.0.2.2"}, {"ip": "192.0.2.3", "ipMode": "Proxy"}, {}]}
        },
    )
    assert record.addresses == ("10.0.0.1", "fd00::1", "192.0.2.1", "192.0.2.2")


def test_an_old_service_has_its_cluster_ip_alone() -> None:
    """Without clusterIPs (before dual stack) the field clusterIP counts."""
    assert service({"clusterIP": "10.0.0.1", "ports": PORTS}).addresses == ("10.0.0.1",)


@pytest.mark.parametrize(
    ("spec", "labels"),
    [
        ({"clusterIP": "None", "clusterIPs": ["None"], "ports": PORTS}, {}),
        ({"clusterIP": "", "ports": PORTS, "externalIPs": ["192.0.2.1"]}, {}),
        ({"type": "ExternalName", "externalName": "example.org"}, {}),
        ({"clusterIP": "10.0.0.1", "ports": PORTS}, {"service.kubernetes.io/service-proxy-name": "other"}),
        ({"clusterIP": "10.0.0.1", "ports": PORTS}, {"service.kubernetes.io/headless": ""}),
    ],
)
def test_services_that_kube_proxy_skips_have_no_address(spec: dict[str, Any], labels: dict[str, str]) -> None:
    """Headless, external-name and relabelled Services exist, but nothing in the kernel answers for them."""
    assert service(spec, labels=labels) == ServiceRecord("ns", "web", NEWEST)


def test_ports_have_a_name_or_their_number_as_text() -> None:
    """A port is known by its name, else its number; protocols are TCP by default."""
    ports = service(
        {
            "clusterIP": "10.0.0.1",
            "ports": [
                {"port": 80, "nodePort": 30080},
                {"name": "dns", "port": 53, "protocol": "UDP"},
                {"name": "sig", "port": 36412, "protocol": "SCTP"},
            ],
        }
    ).ports
    assert [port.service_port for port in ports] == [
        ServicePort("ns", "web", "80", Protocol.TCP),
        ServicePort("ns", "web", "dns", Protocol.UDP),
        ServicePort("ns", "web", "sig", Protocol.SCTP),
    ]
    assert [port.node_port for port in ports] == [30080, 0, 0]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({}, "metadata: expected a mapping, found nothing"),
        ({"metadata": {}}, "metadata.name: expected a name, found nothing"),
        ({"metadata": {"name": "a"}, "spec": []}, "spec: expected a mapping, found a list ([])"),
        (
            {"metadata": {"name": "a"}, "spec": {"ports": [{"port": "80"}]}},
            "spec.ports[0].port: expected an integer, found a string ('80')",
        ),
        (
            {"metadata": {"name": "a"}, "spec": {"ports": [{"port": True}]}},
            "spec.ports[0].port: expected an integer, found true or false (True)",
        ),
        (
            {"metadata": {"name": "a"}, "spec": {"ports": [{"port": 70000}]}},
            "spec.ports[0].port: expected a port number from 1 to 65535, found an integer (70000)",
        ),
        (
            {"metadata": {"name": "a"}, "spec": {"ports": [{"port": 1, "protocol": "ICMP"}]}},
            "spec.ports[0].protocol: expected TCP, UDP or SCTP, found a string ('ICMP')",
        ),
        (
            {"metadata": {"name": "a"}, "spec": {"clusterIPs": ["10.0.0.256"]}},
            "spec.clusterIPs[0]: expected an IP address, found a string ('10.0.0.256')",
        ),
        (
            {"metadata": {"name": "a", "creationTimestamp": "yesterday"}},
            "metadata.creationTimestamp: expected a time as 2006-01-02T15:04:05Z, found a string ('yesterday')",
        ),
    ],
)
def test_a_wrong_field_is_named_with_what_was_expected(raw: dict[str, Any], message: str) -> None:
    """The error has the path of the field, what should be there and what is."""
    with pytest.raises(ObjectError) as caught:
        decode(Kind.SERVICES, raw)
    assert str(caught.value) == message


def test_a_slice_gives_each_port_every_endpoint() -> None:
    """Endpoints have the slice's ports, their first address, and kube-proxy's defaults for missing conditions."""
    record = decode(
        Kind.ENDPOINT_SLICES,
        {
            "metadata": {"name": "web-1", "namespace": "ns", "labels": {"kubernetes.io/service-name": "web"}},
            "addressType": "IPv4",
            "ports": [{"name": "http", "port": 8080}, {"name": "all"}, {"port": 53, "protocol": "UDP"}],
            "endpoints": [
                {
                    "addresses": ["10.1.0.1", "10.1.0.2"],
                    "targetRef": {"kind": "Pod", "namespace": "ns", "name": "p"},
                },
                {
                    "addresses": ["10.1.0.3"],
                    "nodeName": "n",
                    "conditions": {"ready": False, "terminating": True},
                },
                {"addresses": []},
            ],
        },
    )
    assert isinstance(record, SliceRecord)
    assert record.service == "web"
    assert dict(record.endpoints) == {
        ("http", Protocol.TCP): (
            Endpoint("10.1.0.1", 8080, "", "ns/p"),
            Endpoint("10.1.0.3", 8080, "n", ready=False, terminating=True),
        ),
        ("", Protocol.UDP): (
            Endpoint("10.1.0.1", 53, "", "ns/p"),
            Endpoint("10.1.0.3", 53, "n", ready=False, terminating=True),
        ),
    }


def test_slices_of_host_names_have_no_endpoints() -> None:
    """FQDN slices hold no addresses."""
    raw = {
        "metadata": {"name": "s", "namespace": "ns", "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "FQDN",
        "ports": [{"port": 80}],
        "endpoints": [{"addresses": ["example.org"]}],
    }
    record = decode(Kind.ENDPOINT_SLICES, raw)
    assert isinstance(record, SliceRecord)
    assert record.endpoints == ((("", Protocol.TCP), ()),)


@pytest.mark.parametrize(
    ("spec", "phase", "owns"),
    [
        ({}, "Running", True),
        ({"hostNetwork": True}, "Running", False),
        ({}, "Succeeded", False),
        ({}, "Failed", False),
    ],
)
def test_pods_own_their_addresses_only_while_they_run_in_their_own_network(
    spec: dict[str, Any], phase: str, owns: bool
) -> None:
    """Addresses of host-network pods are the node's, and those of ended pods may be another's already."""
    raw = {
        "metadata": {"name": "p", "namespace": "ns"},
        "spec": spec,
        "status": {"phase": phase, "podIP": "10.1.0.1"},
    }
    record = decode(Kind.PODS, raw)
    assert isinstance(record, PodRecord)
    assert (record.owns_addresses, record.pod.ips) == (owns, ("10.1.0.1",))


def test_a_node_has_ip_addresses_only() -> None:
    """Host names are not among a node's addresses."""
    addresses = [{"type": "InternalIP", "address": "172.18.0.2"}, {"type": "Hostname", "address": "n"}]
    record = decode(Kind.NODES, {"metadata": {"name": "n"}, "status": {"addresses": addresses}})
    assert record == NodeRecord("n", ("172.18.0.2",))


def test_other_kinds_are_not_ours() -> None:
    """Kinds are told apart by API group too: Knative has Services of its own."""
    assert kind_of({"apiVersion": "v1", "kind": "Service"}) is Kind.SERVICES
    assert kind_of({"apiVersion": "serving.knative.dev/v1", "kind": "Service"}) is None
    with pytest.raises(ObjectError, match="kind: expected a string, found nothing"):
        kind_of({"apiVersion": "v1"})


FIELDS = [
    "metadata",
    "name",
    "namespace",
    "labels",
    "creationTimestamp",
    "spec",
    "status",
    "ports",
    "port",
    "protocol",
    "clusterIPs",
    "endpoints",
    "addresses",
    "conditions",
    "ready",
    "targetRef",
    "loadBalancer",
    "ingress",
    "podIPs",
    "ip",
    "kubernetes.io/service-name",
]
field_names = st.sampled_from(FIELDS)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(field_names, inner, max_size=4),
    max_leaves=12,
)


@given(kind=st.sampled_from(Kind), raw=st.dictionaries(field_names, json_values, max_size=6))
def test_any_json_is_decoded_or_refused(kind: Kind, raw: dict[str, Any]) -> None:
    """Whatever an object holds, the decoder gives a record or says what is wrong, and nothing else happens."""
    try:
        assert decode(kind, raw).kind is kind
    except ObjectError as error:
        assert "expected" in str(error)
