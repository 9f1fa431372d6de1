# SPDX-License-Identifier: Apache-2.0
"""Kubernetes objects that tests write: pure.

What is the same in every test comes from `kptrace.experiments.manifests`; here is what a Service can be besides.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from kptrace.model.identity import Endpoint
from tests.cluster.client import Object

SERVICE_NAME_LABEL = "kubernetes.io/service-name"


@dataclass(frozen=True, slots=True)
class Port:
    """A port of a Service: `node_port` 0 lets the API server choose where the type has one."""

    name: str = "http"
    number: int = 80
    target: int = 8080
    protocol: str = "TCP"
    node_port: int = 0

    def spec(self) -> Object:
        """As it is in a Service."""
        found: Object = {
            "name": self.name,
            "port": self.number,
            "targetPort": self.target,
            "protocol": self.protocol,
        }
        return {**found, "nodePort": self.node_port} if self.node_port else found


def service(
    name: str,
    namespace: str,
    *ips: str,
    kind: str = "ClusterIP",
    ports: Sequence[Port] = (Port(),),
    external_ips: Sequence[str] = (),
    labels: dict[str, str] | None = None,
    **spec: object,
) -> Object:
    """A Service without a selector, with these cluster IPs (two for dual-stack; "None" for headless).

    Args:
        name: of the Service.
        namespace: of the Service.
        ips: cluster IPs; none leaves the choice to the API server.
        kind: ClusterIP, NodePort or LoadBalancer.
        ports: what it listens on.
        external_ips: addresses that somebody routes to the nodes.
        labels: of the Service.
        spec: more fields, as they are called there (internalTrafficPolicy="Local").
    """
    families = ["IPv6" if ":" in ip else "IPv4" for ip in ips if ip != "None"]
    addresses: Object = {"clusterIP": ips[0], "clusterIPs": list(ips)} if ips else {}
    if families:
        addresses |= {
            "ipFamilies": families,
            "ipFamilyPolicy": "RequireDualStack" if len(families) == 2 else "SingleStack",
        }
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"namespace": namespace, "name": name, "labels": labels or {}},
        "spec": {
            "type": kind,
            "ports": [port.spec() for port in ports],
            "externalIPs": list(external_ips),
            **addresses,
            **spec,
        },
    }


def load_balancer(*ips: str, mode: str = "VIP") -> Object:
    """The status of a Service whose load balancer has these addresses, as a cloud's controller writes it."""
    return {"loadBalancer": {"ingress": [{"ip": ip, "ipMode": mode} for ip in ips]}}


def endpoint_slice(
    service_name: str,
    namespace: str,
    endpoints: Sequence[Endpoint],
    *,
    family: str = "IPv4",
    port: Port | None = None,
    suffix: str = "0",
    annotations: dict[str, str] | None = None,
    labels: dict[str, str] | None = None,
) -> Object:
    """An EndpointSlice of a Service: all endpoints at the target port."""
    port = port or Port()
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "namespace": namespace,
            "name": f"{service_name}-{family.lower()}-{suffix}",
            "labels": {SERVICE_NAME_LABEL: service_name, **(labels or {})},
            "annotations": annotations or {},
        },
        "addressType": family,
        "ports": [{"name": port.name, "port": port.target, "protocol": port.protocol}],
        "endpoints": [_endpoint(endpoint) for endpoint in endpoints],
    }


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
    zones, nodes = ([{"name": name} for name in names] for names in endpoint.hints)
    if hints := {key: value for key, value in (("forZones", zones), ("forNodes", nodes)) if value}:
        found["hints"] = hints
    return found


def pod(name: str, namespace: str, node: str, *, host_network: bool = False) -> Object:
    """A pod that was placed on a node; its addresses are in its status."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"namespace": namespace, "name": name},
        "spec": {
            "nodeName": node,
            "hostNetwork": host_network,
            "containers": [{"name": "main", "image": "example.invalid/main"}],
        },
    }


def running(*ips: str) -> Object:
    """The status of a pod that has these addresses, as a kubelet writes it."""
    return {"phase": "Running", "podIP": ips[0], "podIPs": [{"ip": ip} for ip in ips]}


def node(name: str, *, labels: dict[str, str] | None = None) -> Object:
    """A node; its addresses are in its status."""
    return {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": labels or {}}}


def reachable(name: str, *ips: str) -> Object:
    """The status of a node that has these addresses."""
    addresses = [{"type": "Hostname", "address": name}]
    return {"addresses": addresses + [{"type": "InternalIP", "address": ip} for ip in ips]}


def namespace(name: str) -> Object:
    """A namespace."""
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}
