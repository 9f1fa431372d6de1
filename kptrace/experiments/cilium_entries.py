# SPDX-License-Identifier: Apache-2.0
"""Keys and values of Cilium's maps as bytes, after its C structures. Pure.

Addresses, ports and a Service's id (`rev_nat_index`) are in network order; counts, slots and ids of back ends are not.
"""

import ipaddress
import struct
from typing import Final

from kptrace.model.identity import ServiceAddress

LOADBALANCER: Final = 32
ACTIVE, TERMINATING = 0, 1


def service_key(address: ServiceAddress, slot: int, *, protocol: bool) -> bytes:
    """`struct lb4_key` or `lb6_key`: slot 0 is the Service itself, its back ends are in those from 1 on."""
    number = address.protocol if protocol else 0
    return (
        ipaddress.ip_address(address.ip).packed
        + address.port.to_bytes(2, "big")
        + struct.pack("<HBBxx", slot, number, 0)
    )


def service_value(
    service: int, *, backend: int = 0, count: int = 0, inactive: int = 0, flags: int = 0
) -> bytes:
    """`struct lb4_service`, which is `lb6_service` too: of the Service itself, or of a slot with its back end's id."""
    return (
        struct.pack("<IH", backend, count)
        + service.to_bytes(2, "big")
        + struct.pack("<BBH", flags, 0, inactive)
    )


def backend_key(backend: int) -> bytes:
    """The id of a back end."""
    return struct.pack("<I", backend)


def backend_value(ip: str, port: int, protocol: int, state: int, size: int) -> bytes:
    """`struct lb4_backend` or `lb6_backend`, with what a version has behind the state left at zero."""
    value = ipaddress.ip_address(ip).packed + port.to_bytes(2, "big") + bytes((protocol, state))
    return value.ljust(size, b"\0")


def reverse_key(service: int) -> bytes:
    """A Service's id, as the keys of `reverse_nat` have it."""
    return service.to_bytes(2, "big")


def reverse_value(address: ServiceAddress) -> bytes:
    """`struct lb4_reverse_nat` or `lb6_reverse_nat`."""
    return ipaddress.ip_address(address.ip).packed + address.port.to_bytes(2, "big")


def affinity_match_key(backend: int, service: int) -> bytes:
    """`struct lb_affinity_match`."""
    return struct.pack("<I", backend) + service.to_bytes(2, "big") + bytes(2)


def endpoint_key(ip: str) -> bytes:
    """`struct endpoint_key`."""
    address = ipaddress.ip_address(ip)
    return address.packed.ljust(16, b"\0") + bytes((1 if address.version == 4 else 2, 0, 0, 0))


def endpoint_value(ifindex: int, endpoint: int, identity: int) -> bytes:
    """`struct endpoint_info`."""
    return struct.pack("<I2xHI4x", ifindex, endpoint, 0) + bytes(16) + struct.pack("<I12x", identity)


def ipcache_entry(network: str, identity: int, size: int) -> tuple[bytes, bytes]:
    """Key and value of the address cache: `struct ipcache_key`, and the beginning of `remote_endpoint_info`."""
    where = ipaddress.ip_network(network)
    key = struct.pack("<IH2x", 32 + where.prefixlen, 0)
    # The family is the last byte of the static part.
    key = key[:7] + bytes((1 if where.version == 4 else 2,)) + where.network_address.packed.ljust(16, b"\0")
    return key, struct.pack("<I", identity).ljust(size, b"\0")


def allow_entry(key_size: int, value_size: int, *, egress: bool, identity: int = 0) -> tuple[bytes, bytes]:
    """Key and value of a policy map that allow everything from or to an identity (0: any), in one direction.

    By the sizes: a hash map's key of 8 bytes, or a trie's of 12 and more, whose prefix ends behind identity and direction.
    """
    if key_size == 8:
        key = struct.pack("<IHBB", identity, 0, 0, int(egress))
    else:
        key = struct.pack("<IIBBH", 40, identity, int(egress), 0, 0).ljust(key_size, b"\0")
    return key, bytes(value_size)
