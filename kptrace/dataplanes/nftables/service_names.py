# SPDX-License-Identifier: Apache-2.0
"""The names that kube-proxy's nftables mode gives to chains and maps, and the keys in its maps. Pure."""

import re
import socket
from dataclasses import dataclass
from typing import Final

from kptrace.dataplanes.service_index import Key, name_hash
from kptrace.dataplanes.told import port_names
from kptrace.model.identity import Protocol, ServicePort
from kptrace.model.netfilter import IpFamily

TABLE: Final = "kube-proxy"
#: Maps by address, protocol and port, and by protocol and port (firewall-ips has only what service-ips has too).
KEY_MAPS: Final = frozenset(
    {"service-ips", "no-endpoint-services", "service-nodeports", "no-endpoint-nodeports"}
)
#: Kinds of chains that choose a back end.
POLICY_CHAINS: Final = frozenset({"service", "local"})
_HASH_LENGTH = 8
_CHAIN: Final = re.compile(
    r"(service|local|external|firewall|endpoint)-([A-Z2-7]{8})-"
    r"(([^/]+)/([^/]+)/(tcp|udp|sctp)/([^/_]*)(?:__([0-9a-f.]+)/([0-9]+))?)"
)
_PROTOCOLS: Final = {int(protocol): protocol for protocol in Protocol}


@dataclass(frozen=True, slots=True)
class ChainName:
    """A chain of one Service port.

    Attributes:
        kind: `service` (policy Cluster), `local` (policy Local), `external`, `firewall`, or `endpoint` (affinity).
        base: `namespace/name/protocol/port`, the port's name empty where it has none.
        endpoint: address and port, of an `endpoint` only.
    """

    kind: str
    base: str
    endpoint: tuple[str, int] | None = None


def parse_chain(name: str) -> ChainName | None:
    """A chain's name; None for others' chains, and where the hash is not that of the rest: that is not kube-proxy's."""
    found = _CHAIN.fullmatch(name)
    if found is None:
        return None
    kind, digest, text, namespace, service, protocol, port, ip, number = found.groups()
    if digest != name_hash(text, _HASH_LENGTH) or (kind == "endpoint") != (ip is not None):
        return None
    endpoint = None
    if ip is not None:
        address = _address(ip)
        if address is None or int(number) > 0xFFFF:
            return None
        endpoint = address, int(number)
    return ChainName(kind, f"{namespace}/{service}/{protocol}/{port}", endpoint)


def bases(port: ServicePort) -> list[str]:
    """What a Service port may be called in chains' names: `namespace/name/protocol/port`."""
    head = f"{port.namespace}/{port.name}/{port.protocol.name.lower()}/"
    return [head + name for name in port_names(port)]


def _address(text: str) -> str | None:
    """An address in a name has dots for colons; four numbers between three dots are IPv4."""
    for family, form in ((socket.AF_INET, text), (socket.AF_INET6, text.replace(".", ":"))):
        try:
            return socket.inet_ntop(family, socket.inet_pton(family, form))
        except OSError:
            continue
    return None


def key_of(key: bytes, family: IpFamily, *, node_port: bool) -> Key | None:
    """The key of a map's element; None if it is none.

    A concatenation: each part is as wide as a multiple of four bytes, and begins at its left.
    """
    width = 0 if node_port else 4 if family is IpFamily.IPV4 else 16
    if len(key) != width + 8 or key[width] not in _PROTOCOLS:
        return None
    number = int.from_bytes(key[width + 4 : width + 6], "big")
    return address_text(key[:width]), number, _PROTOCOLS[key[width]]


def address_text(packed: bytes) -> str:
    """An address in text form; empty for none."""
    if not packed:
        return ""
    return socket.inet_ntop(socket.AF_INET if len(packed) == 4 else socket.AF_INET6, packed)
