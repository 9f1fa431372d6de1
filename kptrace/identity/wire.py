# SPDX-License-Identifier: Apache-2.0
"""Kubernetes objects as they are sent: only the fields that names need, decoded straight from the bytes.

Everything else in an object is skipped without becoming a Python object: of 73 MB of EndpointSlices with 240,000
endpoints that is the larger part. Go writes null for what is empty, so every field may be None.
"""

from typing import Any, Generic, TypeVar

import msgspec
from msgspec import UNSET, UnsetType, field

#: Services and EndpointSlices with these labels are none of kube-proxy's business (its own selectors say so).
HEADLESS_LABEL = "service.kubernetes.io/headless"
PROXY_NAME_LABEL = "service.kubernetes.io/service-proxy-name"
SERVICE_NAME_LABEL = "kubernetes.io/service-name"
ZONE_LABEL = "topology.kubernetes.io/zone"
TRIGGER_ANNOTATION = "endpoints.kubernetes.io/last-change-trigger-time"
#: On the API server's image of a static pod: the uid by which the kubelet runs it.
MIRROR_ANNOTATION = "kubernetes.io/config.mirror"
#: On the bookmark that ends the objects which there were before a watch.
INITIAL_END_ANNOTATION = "k8s.io/initial-events-end"


class Wire(msgspec.Struct, frozen=True, gc=False, rename="camel"):
    """A JSON object; names in camel case, fields that are not listed are skipped."""


class Labels(Wire, frozen=True):
    """The labels that mean something; the first two by being there at all."""

    headless: str | UnsetType | None = field(default=UNSET, name=HEADLESS_LABEL)
    proxy_name: str | UnsetType | None = field(default=UNSET, name=PROXY_NAME_LABEL)
    service_name: str | None = field(default=None, name=SERVICE_NAME_LABEL)
    zone: str | None = field(default=None, name=ZONE_LABEL)

    @property
    def foreign(self) -> bool:
        """Whether kube-proxy leaves the object to others."""
        return self.headless is not UNSET or self.proxy_name is not UNSET


class Annotations(Wire, frozen=True):
    """The annotations that mean something; anybody may write them, so anything may be there."""

    trigger: Any = field(default=None, name=TRIGGER_ANNOTATION)
    mirror: Any = field(default=None, name=MIRROR_ANNOTATION)
    initial_end: Any = field(default=None, name=INITIAL_END_ANNOTATION)


class Metadata(Wire, frozen=True):
    """What every object has."""

    name: str | None = None
    namespace: str | None = None
    uid: str | None = None
    resource_version: str | None = None
    creation_timestamp: str | None = None
    deletion_timestamp: str | None = None
    labels: Labels | None = None
    annotations: Annotations | None = None


class Named(Wire, frozen=True):
    """Any object, as far as its metadata."""

    metadata: Metadata | None = None


Object = TypeVar("Object", bound=Named)


class Event(msgspec.Struct, Generic[Object], frozen=True, gc=False):
    """One line of a watch."""

    type: str
    object: Object


class Version(Wire, frozen=True):
    """The version alone."""

    resource_version: str = ""


class Versioned(Wire, frozen=True):
    """An object whose other fields do not matter, as they may be wrong."""

    metadata: Version | None = None


class ServicePort(Wire, frozen=True):
    """An item of `spec.ports` of a Service, or of `ports` of an EndpointSlice."""

    name: str | None = None
    port: int | None = None
    node_port: int | None = None
    protocol: str | None = None


class ServiceSpec(Wire, frozen=True):
    """`spec` of a Service."""

    type: str | None = None
    cluster_ip: str | None = field(default=None, name="clusterIP")
    cluster_ips: list[str] | None = field(default=None, name="clusterIPs")
    external_ips: list[str] | None = field(default=None, name="externalIPs")
    ports: list[ServicePort] | None = None
    internal_traffic_policy: str | None = None
    external_traffic_policy: str | None = None


class Ingress(Wire, frozen=True):
    """An address of a load balancer."""

    ip: str | None = None
    ip_mode: str | None = None


class LoadBalancer(Wire, frozen=True):
    """`status.loadBalancer` of a Service."""

    ingress: list[Ingress] | None = None


class ServiceStatus(Wire, frozen=True):
    """`status` of a Service."""

    load_balancer: LoadBalancer | None = None


class Service(Named, frozen=True):
    """v1 Service."""

    spec: ServiceSpec | None = None
    status: ServiceStatus | None = None


class Conditions(Wire, frozen=True):
    """Of an endpoint."""

    ready: bool | None = None
    serving: bool | None = None
    terminating: bool | None = None


class Target(Wire, frozen=True):
    """What an endpoint is, usually a pod."""

    kind: str | None = None
    namespace: str | None = None
    name: str | None = None


class Hint(Wire, frozen=True):
    """A zone or node."""

    name: str | None = None


class EndpointHints(Wire, frozen=True):
    """Where an endpoint is meant to be used."""

    for_zones: list[Hint] | None = None
    for_nodes: list[Hint] | None = None


class Endpoint(Wire, frozen=True):
    """An item of `endpoints`."""

    addresses: list[str] | None = None
    conditions: Conditions | None = None
    node_name: str | None = None
    target_ref: Target | None = None
    hints: EndpointHints | None = None


class EndpointSlice(Named, frozen=True):
    """discovery.k8s.io/v1 EndpointSlice."""

    address_type: str | None = None
    ports: list[ServicePort] | None = None
    endpoints: list[Endpoint] | None = None


class PodSpec(Wire, frozen=True):
    """`spec` of a Pod."""

    node_name: str | None = None
    host_network: bool | None = None


class PodAddress(Wire, frozen=True):
    """An item of `status.podIPs`."""

    ip: str | None = None


class PodStatus(Wire, frozen=True):
    """`status` of a Pod."""

    phase: str | None = None
    pod_ip: str | None = field(default=None, name="podIP")
    pod_ips: list[PodAddress] | None = field(default=None, name="podIPs")


class Pod(Named, frozen=True):
    """v1 Pod."""

    spec: PodSpec | None = None
    status: PodStatus | None = None


class NodeAddress(Wire, frozen=True):
    """An item of `status.addresses`."""

    type: str | None = None
    address: str | None = None


class NodeStatus(Wire, frozen=True):
    """`status` of a Node."""

    addresses: list[NodeAddress] | None = None


class Node(Named, frozen=True):
    """v1 Node."""

    status: NodeStatus | None = None
