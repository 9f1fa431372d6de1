# SPDX-License-Identifier: Apache-2.0
"""The names that kube-proxy gives to its chains: pure.

The hashes are those of pkg/proxy/nftables and pkg/proxy/iptables in Kubernetes 1.36, checked against its rule sets.
"""

import base64
import hashlib

from kptrace.experiments.services import ServiceSpec
from kptrace.model.identity import Endpoint

NFTABLES_HASH_LENGTH = 8
IPTABLES_HASH_LENGTH = 16


def _hash(text: str, length: int) -> str:
    return base64.b32encode(hashlib.sha256(text.encode()).digest()).decode()[:length]


def host_port(endpoint: Endpoint) -> str:
    """`ip:port`, or `[ip]:port` for IPv6: how kube-proxy writes and hashes an endpoint."""
    return f"[{endpoint.ip}]:{endpoint.port}" if ":" in endpoint.ip else f"{endpoint.ip}:{endpoint.port}"


def _nftables_base(service: ServiceSpec) -> str:
    base = f"{service.port.namespace}/{service.port.name}/{service.protocol}/{service.port.port}"
    return f"{_hash(base, NFTABLES_HASH_LENGTH)}-{base}"


def nftables_service_chain(service: ServiceSpec) -> str:
    """`service-AXK6CI2C-demo/web/tcp/http`."""
    return f"service-{_nftables_base(service)}"


def nftables_external_chain(service: ServiceSpec) -> str:
    """`external-AXK6CI2C-demo/web/tcp/http`: where packets to the external address go first."""
    return f"external-{_nftables_base(service)}"


def iptables_service_chain(service: ServiceSpec) -> str:
    """`KUBE-SVC-XRY76EGRC3BSCIIJ`."""
    return "KUBE-SVC-" + _hash(service.full_name + service.protocol, IPTABLES_HASH_LENGTH)


def iptables_external_chain(service: ServiceSpec) -> str:
    """`KUBE-EXT-XRY76EGRC3BSCIIJ`: where packets to the external address go first."""
    return "KUBE-EXT-" + _hash(service.full_name + service.protocol, IPTABLES_HASH_LENGTH)


def iptables_endpoint_chain(service: ServiceSpec, endpoint: Endpoint) -> str:
    """`KUBE-SEP-4R67FX26EEAQJQLI`."""
    return "KUBE-SEP-" + _hash(
        service.full_name + service.protocol + host_port(endpoint), IPTABLES_HASH_LENGTH
    )
