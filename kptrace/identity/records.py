# SPDX-License-Identifier: Apache-2.0
"""What is kept of each Kubernetes object: the few fields that names need, frozen."""

from dataclasses import dataclass, field
from enum import IntFlag, StrEnum
from typing import ClassVar

from kptrace.identity.fields import NEWEST
from kptrace.identity.packing import NOTHING, ByPort, Packed, pack_endpoints, unpack
from kptrace.model.identity import Pod, ServicePort

Name = tuple[str, str]


class Kind(StrEnum):
    """What is decoded, in the API's own plural: it is a label value and a part of URLs."""

    SERVICES = "services"
    ENDPOINT_SLICES = "endpointslices"
    PODS = "pods"
    NODES = "nodes"


class LocalPolicy(IntFlag):
    """Which of a Service's traffic policies are `Local`: to its cluster IP, and to everything else."""

    NONE = 0
    INTERNAL = 1
    EXTERNAL = 2


@dataclass(frozen=True, slots=True)
class PortRecord:
    """One port of a Service.

    Attributes:
        service_port: what metrics are kept by.
        name: as EndpointSlices refer to it; empty for the only port of a Service.
        number: where the Service listens.
        node_port: where every node listens; 0 for nowhere.
    """

    service_port: ServicePort
    name: str
    number: int
    node_port: int = 0


@dataclass(frozen=True, slots=True)
class ServiceRecord:
    """A Service.

    Attributes:
        namespace, name: its own.
        created: seconds since the epoch, `NEWEST` where unknown.
        ports: none where kube-proxy does not serve it.
        addresses: cluster, external and load-balancer IPs, in this order, each once.
        cluster_ips: how many of them are cluster IPs.
        local: traffic policies.
    """

    kind: ClassVar[Kind] = Kind.SERVICES
    namespace: str
    name: str
    created: int = NEWEST
    ports: tuple[PortRecord, ...] = ()
    addresses: tuple[str, ...] = ()
    cluster_ips: int = 0
    local: LocalPolicy = LocalPolicy.NONE

    @property
    def key(self) -> Name:
        """Namespace and name."""
        return self.namespace, self.name


@dataclass(frozen=True, slots=True, init=False)
class SliceRecord:
    """An EndpointSlice.

    Attributes:
        namespace, name: its own.
        service: name of the Service in the same namespace; empty for none that kube-proxy serves.
        packed: its endpoints.
        trigger_ns: when the change happened that it was last written for, in ns since the epoch, by the clock of
            whoever saw it; 0 where it does not say. A slice of which no more than this changed is the same slice.
    """

    kind: ClassVar[Kind] = Kind.ENDPOINT_SLICES
    namespace: str
    name: str
    service: str
    packed: Packed
    trigger_ns: int = field(compare=False)

    def __init__(
        self,
        namespace: str,
        name: str,
        service: str = "",
        endpoints: Packed | ByPort = NOTHING,
        trigger_ns: int = 0,
    ) -> None:
        """Keep these endpoints: packed, or by port."""
        packed = endpoints if isinstance(endpoints, Packed) else pack_endpoints(endpoints)
        for name_, value in zip(
            ("namespace", "name", "service", "packed", "trigger_ns"),
            (namespace, name, service, packed, trigger_ns),
            strict=True,
        ):
            object.__setattr__(self, name_, value)

    @property
    def key(self) -> Name:
        """Namespace and name."""
        return self.namespace, self.name

    @property
    def endpoints(self) -> ByPort:
        """Its endpoints by port name and protocol; unpacked anew each time."""
        return unpack(self.packed)


@dataclass(frozen=True, slots=True)
class PodRecord:
    """A pod.

    Attributes:
        pod: its names and addresses.
        created: seconds since the epoch, `NEWEST` where unknown.
        leaving: whether it is being deleted.
        cgroup_uid: the uid in its cgroups' paths: of a static pod another than its own.
        owns_addresses: not so in the host's network, nor once it has ended: its addresses are then another's.
    """

    kind: ClassVar[Kind] = Kind.PODS
    pod: Pod
    created: int = NEWEST
    leaving: bool = False
    owns_addresses: bool = True
    cgroup_uid: str = ""

    @property
    def key(self) -> Name:
        """Namespace and name."""
        return self.pod.namespace, self.pod.name


@dataclass(frozen=True, slots=True)
class NodeRecord:
    """A node, its IP addresses (host names are not among them), and its topology zone, empty where it has none."""

    kind: ClassVar[Kind] = Kind.NODES
    name: str
    addresses: tuple[str, ...] = ()
    zone: str = ""

    @property
    def key(self) -> Name:
        """No namespace, and the name."""
        return "", self.name


Record = ServiceRecord | SliceRecord | PodRecord | NodeRecord
