# SPDX-License-Identifier: Apache-2.0
"""The chain names' hashes against names that the real kube-proxy wrote."""

from dataclasses import replace

from kptrace.experiments.chain_names import (
    host_port,
    iptables_endpoint_chain,
    iptables_external_chain,
    iptables_service_chain,
    nftables_external_chain,
    nftables_service_chain,
)
from kptrace.experiments.services import ServiceSpec
from kptrace.model.identity import Endpoint, Protocol, ServiceAddress, ServicePort

WEB = ServiceSpec(
    ServicePort("demo", "web", "http", Protocol.TCP),
    ServiceAddress("10.96.10.1", 80, Protocol.TCP),
    (Endpoint("10.244.1.11", 8080), Endpoint("10.244.2.12", 8080)),
)


def test_an_nftables_chain_is_named_as_kube_proxy_named_it() -> None:
    """The nftables chain of demo/web:http has the name that kube-proxy 1.36 gave it."""
    assert nftables_service_chain(WEB) == "service-AXK6CI2C-demo/web/tcp/http"


def test_an_iptables_service_chain_is_named_as_kube_proxy_named_it() -> None:
    """The iptables chain of demo/web:http has the name that kube-proxy 1.36 gave it."""
    assert iptables_service_chain(WEB) == "KUBE-SVC-XRY76EGRC3BSCIIJ"


def test_iptables_endpoint_chains_are_named_as_kube_proxy_named_them() -> None:
    """Both endpoints' chains have the names that kube-proxy 1.36 gave them."""
    names = [iptables_endpoint_chain(WEB, endpoint) for endpoint in WEB.endpoints]
    assert names == ["KUBE-SEP-4R67FX26EEAQJQLI", "KUBE-SEP-UZD5V5ZXLABHQ6GD"]


def test_external_chains_are_named_as_kube_proxy_named_them() -> None:
    """An external address's chains have the Service chains' hashes under names of their own."""
    web = replace(WEB, port=ServicePort("probe", "web-00000", "http", Protocol.TCP))
    assert nftables_external_chain(web) == "external-3YSYHHIQ-probe/web-00000/tcp/http"
    assert iptables_external_chain(web) == "KUBE-EXT-TCZQ6L7JF37WIBMN"


def test_an_ipv6_endpoint_is_written_in_brackets() -> None:
    """An IPv6 endpoint's address is bracketed, as in a URL."""
    assert host_port(Endpoint("fd00:244::1", 8080)) == "[fd00:244::1]:8080"
