# SPDX-License-Identifier: Apache-2.0
"""Kubernetes objects, as `identity.wire` has them, reduced to what names need.

Decoding is sparse (missing fields have Kubernetes' defaults, unknown ones are not looked at) and strict (a field of the
wrong type is an `ObjectError`). What a Service means follows kube-proxy: no addresses for ExternalName and headless
Services, nor for those whose labels hand them to another proxy or to none.
"""

import sys
from collections.abc import Mapping
from typing import Any

import msgspec

from kptrace.identity import wire
from kptrace.identity.decoding import from_bytes, from_mapping
from kptrace.identity.fields import ObjectError, ip_of, member, port_of, protocol_of, time_of
from kptrace.identity.named import metadata_of, name_of
from kptrace.identity.policies import local_policy
from kptrace.identity.records import (
    Kind,
    NodeRecord,
    PodRecord,
    PortRecord,
    Record,
    ServiceRecord,
)
from kptrace.identity.slices import slice_record
from kptrace.model.identity import Pod, ServicePort

_KINDS = {
    ("v1", "Service"): Kind.SERVICES,
    ("discovery.k8s.io/v1", "EndpointSlice"): Kind.ENDPOINT_SLICES,
    ("discovery.k8s.io/v1beta1", "EndpointSlice"): Kind.ENDPOINT_SLICES,
    ("v1", "Pod"): Kind.PODS,
    ("v1", "Node"): Kind.NODES,
}
_WIRE: dict[Kind, type[wire.Named]] = {
    Kind.SERVICES: wire.Service,
    Kind.ENDPOINT_SLICES: wire.EndpointSlice,
    Kind.PODS: wire.Pod,
    Kind.NODES: wire.Node,
}
_EVENTS: dict[Kind, msgspec.json.Decoder[Any]] = {
    # mypy knows no type that is chosen at run time.
    kind: msgspec.json.Decoder(wire.Event[found])  # type: ignore[valid-type]
    for kind, found in _WIRE.items()
}
_NO_LABELS = wire.Labels()


def kind_of(raw: Mapping[str, Any]) -> Kind | None:
    """Which of our kinds an object says it is; None for all others (Knative's Service is another).

    Raises:
        ObjectError: it does not say.
    """
    kind, version = member(raw, "kind", str, ""), member(raw, "apiVersion", str, "")
    if not kind or not version:
        raise ObjectError("apiVersion" if kind else "kind", "a string", None)
    return _KINDS.get((version, kind))


def decode(kind: Kind, raw: Mapping[str, Any]) -> Record:
    """The record of one object.

    Raises:
        ObjectError: a field is of the wrong type, or no name, address, port or protocol where it must be one.
    """
    return record_of(from_mapping(raw, _WIRE[kind]))


def decode_event(kind: Kind, data: bytes) -> wire.Event[wire.Named] | None:
    """A line of a watch with its object, in one go; None where a field is of the wrong type.

    Raises:
        msgspec.DecodeError, UnicodeDecodeError: it is no JSON.
    """
    try:
        event: wire.Event[wire.Named] = _EVENTS[kind].decode(data)
    except msgspec.ValidationError:
        return None
    return event


def decode_bytes(kind: Kind, data: bytes | msgspec.Raw) -> tuple[Record, str]:
    """The record of one object in JSON, and the object's version.

    Raises:
        ObjectError: as in `decode`.
        msgspec.DecodeError, UnicodeDecodeError: it is no JSON.
    """
    found = from_bytes(data, _WIRE[kind])
    return record_of(found), (found.metadata and found.metadata.resource_version) or ""


def record_of(found: wire.Named) -> Record:
    """The record of one object that is decoded.

    Raises:
        ObjectError: as in `decode`.
    """
    match found:
        case wire.Service():
            return _service(found)
        case wire.EndpointSlice():
            return slice_record(found)
        case wire.Pod():
            return _pod(found)
        case wire.Node():
            return _node(found)
    raise TypeError(type(found).__name__)


def _service(found: wire.Service) -> ServiceRecord:
    namespace, name = name_of(found)
    metadata = metadata_of(found)
    spec = found.spec or wire.ServiceSpec()
    created = time_of(metadata.creation_timestamp, "metadata.creationTimestamp")
    cluster_ips = _cluster_ips(spec)
    ports = tuple(
        _service_port(namespace, name, port, f"spec.ports[{index}]")
        for index, port in enumerate(spec.ports or ())
    )
    addresses = [*cluster_ips, *_extra_ips(found, spec)]
    if spec.type == "ExternalName" or not cluster_ips or (metadata.labels or _NO_LABELS).foreign:
        return ServiceRecord(namespace, name, created)
    unique = tuple(dict.fromkeys(addresses))
    return ServiceRecord(
        namespace, name, created, ports, unique, len(dict.fromkeys(cluster_ips)), local_policy(spec)
    )


def _cluster_ips(spec: wire.ServiceSpec) -> list[str]:
    listed = spec.cluster_ips or [spec.cluster_ip or ""]
    return [
        ip_of(ip, f"spec.clusterIPs[{index}]") for index, ip in enumerate(listed) if ip not in ("", "None")
    ]


def _extra_ips(found: wire.Service, spec: wire.ServiceSpec) -> list[str]:
    extra = [ip_of(ip, f"spec.externalIPs[{index}]") for index, ip in enumerate(spec.external_ips or ())]
    balancer = found.status.load_balancer if found.status else None
    for index, ingress in enumerate((balancer.ingress if balancer else None) or ()):
        # In the mode Proxy packets are to travel through the load balancer: nodes do not answer for its address.
        if ingress.ip and ingress.ip_mode != "Proxy":
            extra.append(ip_of(ingress.ip, f"status.loadBalancer.ingress[{index}].ip"))
    return extra


def _service_port(namespace: str, service: str, found: wire.ServicePort, path: str) -> PortRecord:
    number = port_of(found.port, f"{path}.port")
    if not number:
        raise ObjectError(f"{path}.port", "a port number from 1 to 65535", found.port)
    name = sys.intern(found.name or "")
    protocol = protocol_of(found.protocol, f"{path}.protocol")
    identity = ServicePort(namespace, service, name or sys.intern(str(number)), protocol)
    return PortRecord(identity, name, number, port_of(found.node_port, f"{path}.nodePort"))


def _pod(found: wire.Pod) -> PodRecord:
    namespace, name = name_of(found)
    metadata = metadata_of(found)
    spec, status = found.spec or wire.PodSpec(), found.status or wire.PodStatus()
    listed = [entry.ip or "" for entry in status.pod_ips or ()] or [status.pod_ip or ""]
    host_network = spec.host_network or False
    pod = Pod(
        namespace=namespace,
        name=name,
        uid=metadata.uid or "",
        node=sys.intern(spec.node_name or ""),
        ips=tuple(ip_of(ip, f"status.podIPs[{index}].ip") for index, ip in enumerate(listed) if ip),
        host_network=host_network,
    )
    ended = status.phase in ("Succeeded", "Failed")
    created = time_of(metadata.creation_timestamp, "metadata.creationTimestamp")
    mirror = metadata.annotations.mirror if metadata.annotations else None
    return PodRecord(
        pod,
        created,
        bool(metadata.deletion_timestamp),
        not (host_network or ended),
        mirror if isinstance(mirror, str) and mirror else pod.uid,
    )


def _node(found: wire.Node) -> NodeRecord:
    _, name = name_of(found)
    addresses = [
        ip_of(entry.address or "", f"status.addresses[{index}].address")
        for index, entry in enumerate((found.status.addresses if found.status else None) or ())
        if entry.type in ("InternalIP", "ExternalIP")
    ]
    labels = metadata_of(found).labels or _NO_LABELS
    return NodeRecord(name, tuple(dict.fromkeys(addresses)), labels.zone or "")
