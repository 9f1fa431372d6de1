# SPDX-License-Identifier: Apache-2.0
"""Kubernetes objects as JSON gives them, decoded to the few fields that names need.

Decoding is sparse (missing fields have Kubernetes' defaults, unknown ones are not looked at) and strict (a field of the
wrong type is an `ObjectError`). What a Service means follows kube-proxy: no addresses for ExternalName and headless
Services, nor for those whose labels hand them to another proxy or to none.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from kptrace.identity.fields import (
    ObjectError,
    instant_of,
    ip_of,
    member,
    members,
    port_of,
    protocol_of,
    text_of,
    time_of,
)
from kptrace.identity.policies import hints_of, local_policy
from kptrace.identity.records import (
    Kind,
    Name,
    NodeRecord,
    PodRecord,
    PortRecord,
    Record,
    ServiceRecord,
    SliceRecord,
)
from kptrace.model.identity import Endpoint, Hints, Pod, ServicePort

#: Services and EndpointSlices with these labels are none of kube-proxy's business (its own selectors say so).
HEADLESS_LABEL = "service.kubernetes.io/headless"
PROXY_NAME_LABEL = "service.kubernetes.io/service-proxy-name"
SERVICE_NAME_LABEL = "kubernetes.io/service-name"
ZONE_LABEL = "topology.kubernetes.io/zone"
TRIGGER_ANNOTATION = "endpoints.kubernetes.io/last-change-trigger-time"

_KINDS = {
    ("v1", "Service"): Kind.SERVICES,
    ("discovery.k8s.io/v1", "EndpointSlice"): Kind.ENDPOINT_SLICES,
    ("discovery.k8s.io/v1beta1", "EndpointSlice"): Kind.ENDPOINT_SLICES,
    ("v1", "Pod"): Kind.PODS,
    ("v1", "Node"): Kind.NODES,
}


def kind_of(raw: Mapping[str, Any]) -> Kind | None:
    """Which of our kinds an object says it is; None for all others (Knative's Service is another).

    Raises:
        ObjectError: it does not say.
    """
    kind, version = member(raw, "kind", str, ""), member(raw, "apiVersion", str, "")
    if not kind or not version:
        raise ObjectError("apiVersion" if kind else "kind", "a string", None)
    return _KINDS.get((version, kind))


def name_of(raw: Mapping[str, Any]) -> Name:
    """Namespace (empty where there is none) and name.

    Raises:
        ObjectError: it has no name.
    """
    metadata = member(raw, "metadata", dict, "")
    if metadata is None:
        raise ObjectError("metadata", "a mapping", None)
    name = text_of(metadata, "name", "metadata")
    if not name:
        raise ObjectError("metadata.name", "a name", metadata.get("name"))
    return sys.intern(text_of(metadata, "namespace", "metadata")), name


def decode(kind: Kind, raw: Mapping[str, Any]) -> Record:
    """The record of one object.

    Raises:
        ObjectError: a field is of the wrong type, or no name, address, port or protocol where it must be one.
    """
    match kind:
        case Kind.SERVICES:
            return _service(raw)
        case Kind.ENDPOINT_SLICES:
            return _slice(raw)
        case Kind.PODS:
            return _pod(raw)
        case Kind.NODES:
            return _node(raw)


def _service(raw: Mapping[str, Any]) -> ServiceRecord:
    namespace, name = name_of(raw)
    metadata: dict[str, Any] = raw["metadata"]
    labels: dict[str, Any] = member(metadata, "labels", dict, "metadata") or {}
    spec: dict[str, Any] = member(raw, "spec", dict, "") or {}
    created = time_of(metadata, "creationTimestamp", "metadata")
    cluster_ips = _cluster_ips(spec)
    ports = tuple(
        _service_port(namespace, name, port, f"spec.ports[{index}]")
        for index, port in enumerate(members(spec, "ports", dict, "spec"))
    )
    addresses = [*cluster_ips, *_extra_ips(raw, spec)]
    external_name = text_of(spec, "type", "spec") == "ExternalName"
    if external_name or not cluster_ips or HEADLESS_LABEL in labels or PROXY_NAME_LABEL in labels:
        return ServiceRecord(namespace, name, created)
    unique = tuple(dict.fromkeys(addresses))
    return ServiceRecord(
        namespace, name, created, ports, unique, len(dict.fromkeys(cluster_ips)), local_policy(spec)
    )


def _cluster_ips(spec: Mapping[str, Any]) -> list[str]:
    listed: Sequence[str] = members(spec, "clusterIPs", str, "spec") or [text_of(spec, "clusterIP", "spec")]
    return [
        ip_of(ip, f"spec.clusterIPs[{index}]") for index, ip in enumerate(listed) if ip not in ("", "None")
    ]


def _extra_ips(raw: Mapping[str, Any], spec: Mapping[str, Any]) -> list[str]:
    found = [
        ip_of(ip, f"spec.externalIPs[{index}]")
        for index, ip in enumerate(members(spec, "externalIPs", str, "spec"))
    ]
    status: dict[str, Any] = member(raw, "status", dict, "") or {}
    balancer: dict[str, Any] = member(status, "loadBalancer", dict, "status") or {}
    for index, ingress in enumerate(members(balancer, "ingress", dict, "status.loadBalancer")):
        path = f"status.loadBalancer.ingress[{index}]"
        ip = text_of(ingress, "ip", path)
        # In the mode Proxy packets are to travel through the load balancer: nodes do not answer for its address.
        if ip and text_of(ingress, "ipMode", path) != "Proxy":
            found.append(ip_of(ip, f"{path}.ip"))
    return found


def _service_port(namespace: str, service: str, raw: Mapping[str, Any], path: str) -> PortRecord:
    number = port_of(raw, "port", path)
    if not number:
        raise ObjectError(f"{path}.port", "a port number from 1 to 65535", raw.get("port"))
    name = sys.intern(text_of(raw, "name", path))
    identity = ServicePort(namespace, service, name or str(number), protocol_of(raw, path))
    return PortRecord(identity, name, number, port_of(raw, "nodePort", path))


def _slice(raw: Mapping[str, Any]) -> SliceRecord:
    namespace, name = name_of(raw)
    labels: dict[str, Any] = member(raw["metadata"], "labels", dict, "metadata") or {}
    service = text_of(labels, SERVICE_NAME_LABEL, "metadata.labels")
    back_ends = [
        _back_end(endpoint, f"endpoints[{index}]", fqdn=text_of(raw, "addressType", "") == "FQDN")
        for index, endpoint in enumerate(members(raw, "endpoints", dict, ""))
    ]
    if HEADLESS_LABEL in labels or PROXY_NAME_LABEL in labels:
        return SliceRecord(namespace, name)
    by_port = []
    for index, port in enumerate(members(raw, "ports", dict, "")):
        number = port_of(port, "port", f"ports[{index}]")
        if number:
            key = sys.intern(text_of(port, "name", f"ports[{index}]")), protocol_of(port, f"ports[{index}]")
            ends = (end for end in back_ends if end is not None)
            by_port.append((key, tuple(Endpoint(end[0], number, *end[1:]) for end in ends)))
    annotations: dict[str, Any] = member(raw["metadata"], "annotations", dict, "metadata") or {}
    return SliceRecord(
        namespace, name, service, tuple(by_port), instant_of(annotations.get(TRIGGER_ANNOTATION))
    )


def _back_end(
    raw: Mapping[str, Any], path: str, *, fqdn: bool
) -> tuple[str, str, str, bool, bool, bool, Hints] | None:
    addresses: Sequence[str] = members(raw, "addresses", str, path)
    conditions: dict[str, Any] = member(raw, "conditions", dict, path) or {}
    ready, serving, terminating = (
        member(conditions, name, bool, f"{path}.conditions") for name in ("ready", "serving", "terminating")
    )
    target: dict[str, Any] = member(raw, "targetRef", dict, path) or {}
    node = sys.intern(text_of(raw, "nodeName", path))
    pod = ""
    if text_of(target, "kind", f"{path}.targetRef") == "Pod":
        pod = f"{text_of(target, 'namespace', path)}/{text_of(target, 'name', path)}"
    if fqdn or not addresses:
        return None
    # All addresses of one endpoint are said to be equivalent, and kube-proxy takes the first.
    ip = ip_of(addresses[0], f"{path}.addresses[0]")
    return ip, node, pod, ready is not False, serving is not False, terminating is True, hints_of(raw, path)


def _pod(raw: Mapping[str, Any]) -> PodRecord:
    namespace, name = name_of(raw)
    metadata: dict[str, Any] = raw["metadata"]
    spec: dict[str, Any] = member(raw, "spec", dict, "") or {}
    status: dict[str, Any] = member(raw, "status", dict, "") or {}
    listed = [
        text_of(entry, "ip", f"status.podIPs[{index}]")
        for index, entry in enumerate(members(status, "podIPs", dict, "status"))
    ] or [text_of(status, "podIP", "status")]
    host_network = member(spec, "hostNetwork", bool, "spec") or False
    pod = Pod(
        namespace=namespace,
        name=name,
        uid=text_of(metadata, "uid", "metadata"),
        node=sys.intern(text_of(spec, "nodeName", "spec")),
        ips=tuple(ip_of(ip, f"status.podIPs[{index}].ip") for index, ip in enumerate(listed) if ip),
        host_network=host_network,
    )
    ended = text_of(status, "phase", "status") in ("Succeeded", "Failed")
    created = time_of(metadata, "creationTimestamp", "metadata")
    leaving = bool(text_of(metadata, "deletionTimestamp", "metadata"))
    return PodRecord(pod, created, leaving, not (host_network or ended))


def _node(raw: Mapping[str, Any]) -> NodeRecord:
    _, name = name_of(raw)
    status: dict[str, Any] = member(raw, "status", dict, "") or {}
    found = []
    for index, entry in enumerate(members(status, "addresses", dict, "status")):
        path = f"status.addresses[{index}]"
        if text_of(entry, "type", path) in ("InternalIP", "ExternalIP"):
            found.append(ip_of(text_of(entry, "address", path), f"{path}.address"))
    labels: dict[str, Any] = member(raw["metadata"], "labels", dict, "metadata") or {}
    return NodeRecord(name, tuple(dict.fromkeys(found)), text_of(labels, ZONE_LABEL, "metadata.labels"))
