# SPDX-License-Identifier: Apache-2.0
"""The Kubernetes names behind addresses, as an immutable snapshot."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from types import MappingProxyType
from typing import NamedTuple


class Protocol(IntEnum):
    """An IP protocol number that a Service port can have."""

    TCP = 6
    UDP = 17
    SCTP = 132


@dataclass(frozen=True, slots=True, order=True)
class ServicePort:
    """One port of one Service: what per-service metrics are kept by.

    Attributes:
        namespace: the Service's.
        name: the Service's.
        port: the port's name, or its number as text where it has none.
        protocol: TCP, UDP or SCTP.
    """

    namespace: str
    name: str
    port: str
    protocol: Protocol


@dataclass(frozen=True, slots=True, order=True)
class ServiceAddress:
    """Where a Service port is reached: a cluster, external or load-balancer address with port and protocol."""

    ip: str
    port: int
    protocol: Protocol


class Hints(NamedTuple):
    """For which zones and nodes an endpoint is meant, both sorted; nothing for all."""

    zones: tuple[str, ...] = ()
    nodes: tuple[str, ...] = ()


NO_HINTS = Hints()


class Endpoint(NamedTuple):
    """One back end of a Service port: a tuple, since there are very many of them.

    Attributes:
        ip: text form.
        port: number.
        node: where it runs; empty where unknown.
        pod: `namespace/name` of its pod; empty where it is none.
        ready, serving, terminating: the EndpointSlice's conditions.
        hints: where it is meant to be used.
    """

    ip: str
    port: int
    node: str = ""
    pod: str = ""
    ready: bool = True
    serving: bool = True
    terminating: bool = False
    hints: Hints = NO_HINTS


@dataclass(frozen=True, slots=True, order=True)
class Pod:
    """A pod as far as addresses and cgroups need it."""

    namespace: str
    name: str
    uid: str
    node: str
    ips: tuple[str, ...] = ()
    host_network: bool = False


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All names that are known at one moment. Never changed, only replaced.

    Attributes:
        revision: grows by one with every replacement.
        taken_at: monotonic seconds when the newest fact in it arrived.
        services: by address; node ports are keyed by `node_ports`.
        node_ports: `(port, protocol)` to Service port.
        endpoints: back ends of each Service port.
        pods_by_ip: pods that own their address (not those of the host network).
        pods_by_uid: pods by the uid in their cgroups' paths.
        nodes: node name to its addresses.
    """

    revision: int = 0
    taken_at: float = 0.0
    services: Mapping[ServiceAddress, ServicePort] = field(default_factory=lambda: MappingProxyType({}))
    node_ports: Mapping[tuple[int, Protocol], ServicePort] = field(
        default_factory=lambda: MappingProxyType({})
    )
    endpoints: Mapping[ServicePort, tuple[Endpoint, ...]] = field(
        default_factory=lambda: MappingProxyType({})
    )
    pods_by_ip: Mapping[str, Pod] = field(default_factory=lambda: MappingProxyType({}))
    pods_by_uid: Mapping[str, Pod] = field(default_factory=lambda: MappingProxyType({}))
    nodes: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: MappingProxyType({}))
