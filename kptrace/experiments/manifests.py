# SPDX-License-Identifier: Apache-2.0
"""Made-up Services as the Kubernetes objects that name them: pure, for `--identity-file`."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from kptrace.experiments.services import ServiceSpec
from kptrace.model.identity import Endpoint
from kptrace.model.netfilter import IpFamily

#: What the EndpointSlice controller puts into one slice at most.
SLICE_ENDPOINTS = 100

Object = dict[str, Any]


def _service(specs: Sequence[ServiceSpec]) -> Object:
    """The Service of all its ports and families."""
    first = specs[0]
    ips = list(dict.fromkeys(spec.address.ip for spec in specs))
    families = list(dict.fromkeys("IPv6" if spec.family is IpFamily.IPV6 else "IPv4" for spec in specs))
    ports = {
        (spec.port.port, spec.port.protocol): {
            "name": spec.port.port,
            "port": spec.address.port,
            "protocol": spec.port.protocol.name,
            "targetPort": spec.endpoints[0].port if spec.endpoints else spec.address.port,
        }
        for spec in specs
    }
    external = list(dict.fromkeys(spec.external.ip for spec in specs if spec.external is not None))
    # A load balancer that sends to the external address itself needs no node port.
    kind: Object = {"type": "LoadBalancer", "allocateLoadBalancerNodePorts": False}
    found: Object = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"namespace": first.port.namespace, "name": first.port.name},
        "spec": {
            **(kind if external else {"type": "ClusterIP"}),
            "clusterIP": ips[0],
            "clusterIPs": ips,
            "ipFamilies": families,
            "ports": list(ports.values()),
        },
    }
    if external:
        ingress = [{"ip": ip, "ipMode": "VIP"} for ip in external]
        found["status"] = {"loadBalancer": {"ingress": ingress}}
    return found


def _endpoint(endpoint: Endpoint) -> Object:
    found: Object = {
        "addresses": [endpoint.ip],
        "conditions": {
            "ready": endpoint.ready,
            "serving": endpoint.serving,
            "terminating": endpoint.terminating,
        },
    }
    if endpoint.node:
        found["nodeName"] = endpoint.node
    if endpoint.pod:
        namespace, _, name = endpoint.pod.partition("/")
        found["targetRef"] = {"kind": "Pod", "namespace": namespace, "name": name}
    return found


def _slices(spec: ServiceSpec) -> Iterator[Object]:
    """The EndpointSlices of one Service port in one family."""
    kind = "IPv6" if spec.family is IpFamily.IPV6 else "IPv4"
    for start in range(0, len(spec.endpoints), SLICE_ENDPOINTS):
        part = spec.endpoints[start : start + SLICE_ENDPOINTS]
        suffix = f"{spec.port.port}-{kind.lower()}-{start // SLICE_ENDPOINTS}"
        yield {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "namespace": spec.port.namespace,
                "name": f"{spec.port.name}-{suffix}",
                "labels": {"kubernetes.io/service-name": spec.port.name},
            },
            "addressType": kind,
            "ports": [{"name": spec.port.port, "port": part[0].port, "protocol": spec.port.protocol.name}],
            "endpoints": [_endpoint(endpoint) for endpoint in part],
        }


def objects(services: Sequence[ServiceSpec]) -> list[Object]:
    """Services, then EndpointSlices; specs of one name (its ports and families) are one Service."""
    grouped: dict[tuple[str, str], list[ServiceSpec]] = {}
    for spec in services:
        grouped.setdefault((spec.port.namespace, spec.port.name), []).append(spec)
    return [_service(specs) for specs in grouped.values()] + [
        one for spec in services for one in _slices(spec)
    ]


def identity_text(services: Sequence[ServiceSpec]) -> str:
    """The text of an identity file: a List in JSON, which is YAML too."""
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": objects(services)}, indent=1) + "\n"
