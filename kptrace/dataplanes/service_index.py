# SPDX-License-Identifier: Apache-2.0
"""From what rules call a Service port back to the Service port: addresses, node ports and hashes. Pure."""

import base64
import hashlib
from collections import OrderedDict
from collections.abc import Iterable
from functools import lru_cache
from typing import Final

from kptrace.dataplanes.told import port_names
from kptrace.model.identity import Protocol, ServiceAddress, ServicePort

#: Service ports that are gone, and are still found: the commit that takes their rules away comes after them.
MAX_GONE: Final = 1024

#: A key of a map: IP address in text form (empty: a node port), port number and protocol.
Key = tuple[str, int, Protocol]
_Clear = tuple[str, str, str, Protocol]


def name_hash(text: str, length: int) -> str:
    """The first characters of a SHA-256 in base32: how kube-proxy shortens names, in all its modes."""
    return base64.b32encode(hashlib.sha256(text.encode()).digest())[:length].decode()


@lru_cache(maxsize=4096)
def iptables_hashes(port: ServicePort) -> tuple[str, ...]:
    """The 16 characters in a Service port's iptables chains; two candidates where the port may have no name."""
    return tuple(name_hash(text, 16) for text in iptables_names(port))


def iptables_names(port: ServicePort) -> tuple[str, ...]:
    """What is hashed for them: `namespace/name:porttcp`."""
    service, protocol = f"{port.namespace}/{port.name}", port.protocol.name.lower()
    return tuple(f"{service}:{name}{protocol}" if name else service + protocol for name in port_names(port))


class ServiceIndex:
    """Kept up Service port by Service port: a change costs what it touches.

    An address that two claim is the last one's; the store knows better, and only the names in a report depend on it.
    """

    def __init__(self) -> None:
        self._keys: dict[Key, ServicePort] = {}
        self._hashes: dict[str, ServicePort] = {}
        self._clear: dict[_Clear, ServicePort] = {}
        self._keys_of: dict[ServicePort, tuple[Key, ...]] = {}
        self._gone: OrderedDict[ServicePort, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._keys_of) - len(self._gone)

    def add(self, port: ServicePort, addresses: Iterable[ServiceAddress] = (), node_port: int = 0) -> None:
        """Know a Service port, with all its present addresses."""
        if port not in self._keys_of:
            self._hashes.update(dict.fromkeys(iptables_hashes(port), port))
            self._clear.update(dict.fromkeys(_clear(port), port))
        self._gone.pop(port, None)
        keys = [(each.ip, each.port, each.protocol) for each in addresses]
        if node_port:
            keys.append(("", node_port, port.protocol))
        self._release(port, keep=keys)
        self._keys.update(dict.fromkeys(keys, port))
        self._keys_of[port] = tuple(keys)

    def remove(self, port: ServicePort) -> None:
        """A Service port is gone; it is still found until `MAX_GONE` others are."""
        if port in self._keys_of:
            self._gone[port] = None
            self._gone.move_to_end(port)
        while len(self._gone) > MAX_GONE:
            self._forget(self._gone.popitem(last=False)[0])

    def at(self, key: Key) -> ServicePort | None:
        """Whose address or node port it is."""
        return self._keys.get(key)

    def hashed(self, text: str) -> ServicePort | None:
        """Whose 16 characters they are."""
        return self._hashes.get(text)

    def named(self, namespace: str, name: str, port: str, protocol: Protocol) -> ServicePort | None:
        """The Service port that kube-proxy calls so; one that nobody knows is taken at its word, if it has a name."""
        known = self._clear.get((namespace, name, port, protocol))
        return known or (ServicePort(namespace, name, port, protocol) if port else None)

    def _forget(self, port: ServicePort) -> None:
        self._release(port)
        del self._keys_of[port]
        for text in iptables_hashes(port):
            self._hashes.pop(text, None)
        for clear in _clear(port):
            if self._clear.get(clear) == port:
                del self._clear[clear]

    def _release(self, port: ServicePort, keep: Iterable[Key] = ()) -> None:
        for key in set(self._keys_of.get(port, ())) - set(keep):
            if self._keys.get(key) == port:
                del self._keys[key]


def _clear(port: ServicePort) -> Iterable[_Clear]:
    return [(port.namespace, port.name, name, port.protocol) for name in port_names(port)]
