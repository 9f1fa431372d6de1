# SPDX-License-Identifier: Apache-2.0
"""Entries of Cilium's service and back end maps, from bytes and back. Pure.

Sizes and byte orders come from the layout; every function takes the layout of its map.
"""

from dataclasses import asdict, dataclass
from enum import IntEnum, IntFlag
from typing import NamedTuple

from kptrace.dataplanes.cilium.layouts import Layout
from kptrace.dataplanes.cilium.records import Record, address_bytes, address_text


class ServiceKey(NamedTuple):
    """A key of the service map.

    Attributes:
        ip: text form.
        port: number; 0 for any (newer versions' drop entry of an address: no service).
        protocol: IP protocol number; 0 for any, as all had before Cilium 1.17.
        slot: 0 for the master entry, else one of its back ends.
        scope: 0 for traffic from outside, and for all where there is no other; 1 for traffic from inside the cluster.
    """

    ip: str
    port: int
    protocol: int
    slot: int = 0
    scope: int = 0


@dataclass(frozen=True, slots=True)
class ServiceValue:
    """A value of the service map.

    Attributes:
        count: of a master entry: slots 1 to count are chosen from.
        backend_id: of a slot: the back end; a master entry has other things there.
        flags: `ServiceFlag`.
        rev_nat: the service's id: one for each address, not for each Service.
        inactive: of a master entry: slots behind `count` that are not chosen from; 0 in older versions.
    """

    count: int = 0
    backend_id: int = 0
    flags: int = 0
    rev_nat: int = 0
    inactive: int = 0


class Backend(NamedTuple):
    """A value of the back end map.

    Attributes:
        ip: text form.
        port: number.
        protocol: IP protocol number; 0 in older versions.
        state: `BackendState`. It only tells the agent's mind: who is chosen is in the slots.
    """

    ip: str
    port: int
    protocol: int = 0
    state: int = 0


class ServiceFlag(IntFlag):
    """`flags` and, shifted by 8, `flags2` of a service's value. None of the first four set: a cluster IP."""

    EXTERNAL_IP = 1
    NODEPORT = 2
    EXT_LOCAL_SCOPE = 4
    HOSTPORT = 8
    AFFINITY = 16
    LOADBALANCER = 32
    ROUTABLE = 64
    SOURCE_RANGE = 128
    LOCALREDIRECT = 1 << 8
    NAT_46X64 = 2 << 8
    L7_LOADBALANCER = 4 << 8
    LOOPBACK = 8 << 8
    INT_LOCAL_SCOPE = 16 << 8
    TWO_SCOPES = 32 << 8
    QUARANTINED = 64 << 8
    FWD_MODE_DSR = 128 << 8


class BackendState(IntEnum):
    """What the agent thinks of a back end."""

    ACTIVE = 0
    TERMINATING = 1
    QUARANTINED = 2
    MAINTENANCE = 3


def decode_service_key(layout: Layout, data: bytes) -> ServiceKey:
    """A key of LB4_SERVICES or LB6_SERVICES.

    Raises:
        ValueError: it is not of the layout's size.
    """
    found = _record(layout.key).decode(data)
    found["ip"] = address_text(found.pop("address"))
    return ServiceKey(**found)


def encode_service_key(layout: Layout, key: ServiceKey) -> bytes:
    """The reverse of `decode_service_key`."""
    return _record(layout.key).encode({**key._asdict(), "address": address_bytes(key.ip)})


def decode_service_value(layout: Layout, data: bytes) -> ServiceValue:
    """A value of LB4_SERVICES or LB6_SERVICES; raises as `decode_service_key` does."""
    found = _record(layout.value).decode(data)
    found["flags"] |= found.pop("flags2") << 8
    return ServiceValue(**found)


def encode_service_value(layout: Layout, value: ServiceValue) -> bytes:
    """The reverse of `decode_service_value`."""
    flags = {"flags": value.flags & 0xFF, "flags2": value.flags >> 8}
    return _record(layout.value).encode({**asdict(value), **flags})


def decode_backend_id(layout: Layout, data: bytes) -> int:
    """A key of LB4_BACKENDS or LB6_BACKENDS; raises as `decode_service_key` does."""
    return int(_record(layout.key).decode(data)["backend_id"])


def encode_backend_id(layout: Layout, backend_id: int) -> bytes:
    """The reverse of `decode_backend_id`."""
    return _record(layout.key).encode({"backend_id": backend_id})


def decode_backend(layout: Layout, data: bytes) -> Backend:
    """A value of LB4_BACKENDS or LB6_BACKENDS; raises as `decode_service_key` does."""
    found = _record(layout.value).decode(data)
    return Backend(address_text(found["address"]), found["port"], found["protocol"], found["state"])


def encode_backend(layout: Layout, backend: Backend) -> bytes:
    """The reverse of `decode_backend`."""
    return _record(layout.value).encode({**backend._asdict(), "address": address_bytes(backend.ip)})


def _record(record: Record | None) -> Record:
    if record is None:
        raise ValueError("what is in this map is not known")
    return record
