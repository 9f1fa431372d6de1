# SPDX-License-Identifier: Apache-2.0
"""Exactly so many first packets: connections and flows from a namespace to Service addresses, each answered."""

import random
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from kptrace.experiments.netns import Namespace
from kptrace.experiments.services import PLANS, Network
from kptrace.model.errors import KptraceError
from kptrace.model.identity import Protocol, ServiceAddress
from kptrace.model.netfilter import IpFamily

#: A lost packet is sent again after a second; a connection that needs longer than a few is no answer.
TIMEOUT_SECONDS = 5.0
_FIRST_PORT = 10000
_LAST_PORT = 59999
_GREETING = 128


@dataclass(frozen=True, slots=True)
class Sent:
    """What was sent, all of it answered.

    Attributes:
        services: connections or flows to each address.
        endpoints: answers from each back end, as `ip port` (TCP only: the back ends introduce themselves).
        packets: datagrams sent (UDP), or connections (TCP).
        seconds: how long it took.
    """

    services: Mapping[ServiceAddress, int]
    endpoints: Mapping[str, int]
    packets: int
    seconds: float

    @property
    def total(self) -> int:
        """First packets: one for each connection or flow."""
        return sum(self.services.values())


class Sources:
    """Source addresses and ports that were never used before, so that each connection is new to conntrack too."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self._pairs = iter((ip, port) for ip in addresses for port in range(_FIRST_PORT, _LAST_PORT + 1))

    def take(self) -> tuple[str, int]:
        """The next pair.

        Raises:
            KptraceError: all have been used.
        """
        try:
            return next(self._pairs)
        except StopIteration:
            raise KptraceError(
                "every source address and port is used up", remedy="send fewer connections"
            ) from None


def client_sources(family: IpFamily, addresses: int = 20) -> Sources:
    """Sources for connections from the client: a million pairs by default."""
    return Sources(_some(PLANS[family].clients, addresses))


def node_sources(family: IpFamily) -> Sources:
    """Sources for connections from the node itself: its one address towards the back ends."""
    return Sources([str(PLANS[family].backend_link[1])])


def _some(network: Network, count: int) -> list[str]:
    return [str(network[1 + index]) for index in range(count)]


def targets(addresses: Sequence[ServiceAddress], count: int, *, seed: int = 0) -> list[ServiceAddress]:
    """`count` random choices of the addresses."""
    return random.Random(seed).choices(addresses, k=count)


def _socket(target: ServiceAddress, kind: socket.SocketKind, source: tuple[str, int]) -> socket.socket:
    family = socket.AF_INET6 if ":" in target.ip else socket.AF_INET
    opened = socket.socket(family, kind)
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.settimeout(TIMEOUT_SECONDS)
        opened.bind(source)
    except BaseException:
        opened.close()
        raise
    return opened


def _connect(target: ServiceAddress, source: tuple[str, int]) -> str:
    """One connection; returns what the back end called itself."""
    with _socket(target, socket.SOCK_STREAM, source) as client:
        client.connect((target.ip, target.port))
        greeting = client.recv(_GREETING)
        while greeting and not greeting.endswith(b"\n"):
            greeting += client.recv(_GREETING)
    if not greeting:
        raise ConnectionError("closed without an answer")
    return greeting.decode().strip()


def _flow(target: ServiceAddress, source: tuple[str, int], datagrams: int, answered: bool) -> str:
    """One UDP flow; returns nothing, since an echo does not introduce itself."""
    with _socket(target, socket.SOCK_DGRAM, source) as client:
        client.connect((target.ip, target.port))
        for number in range(datagrams):
            payload = number.to_bytes(4, "big")
            client.send(payload)
            if answered and client.recv(_GREETING) != payload:
                raise ConnectionError("a wrong answer")
    return ""


def _send(
    namespace: Namespace,
    chosen: Sequence[ServiceAddress],
    one: Callable[[ServiceAddress], str],
    packets_each: int,
) -> Sent:
    services: Counter[ServiceAddress] = Counter()
    endpoints: Counter[str] = Counter()

    def body() -> float:
        begin = time.monotonic()
        for target in chosen:
            try:
                endpoint = one(target)
            except OSError as error:
                raise KptraceError(
                    f"{target.ip} port {target.port}: {error} (after {services.total()} that were answered)",
                    remedy="see whether its rules are installed and lead to a back end",
                ) from error
            services[target] += 1
            if endpoint:
                endpoints[endpoint] += 1
        return time.monotonic() - begin

    seconds = namespace.call(body)
    return Sent(dict(services), dict(endpoints), services.total() * packets_each, seconds)


def tcp_connections(namespace: Namespace, chosen: Sequence[ServiceAddress], sources: Sources) -> Sent:
    """Make one connection to each address in turn, each answered and closed before the next.

    Raises:
        KptraceError: one was not answered.
    """
    return _send(namespace, chosen, lambda target: _connect(target, sources.take()), 1)


def udp_flows(
    namespace: Namespace,
    chosen: Sequence[ServiceAddress],
    sources: Sources,
    *,
    datagrams: int = 1,
    answered: bool = True,
) -> Sent:
    """Open one UDP flow to each address in turn and send so many datagrams in it.

    Raises:
        KptraceError: one was not answered, where that was asked for.
    """
    return _send(
        namespace, chosen, lambda target: _flow(target, sources.take(), datagrams, answered), datagrams
    )


def connections(namespace: Namespace, chosen: Sequence[ServiceAddress], sources: Sources) -> Sent:
    """TCP connections or UDP flows of one datagram, by each address's protocol."""

    def one(target: ServiceAddress) -> str:
        if target.protocol is Protocol.UDP:
            return _flow(target, sources.take(), 1, answered=True)
        return _connect(target, sources.take())

    return _send(namespace, chosen, one, 1)


def spread(total: int, parts: int) -> Iterator[int]:
    """`total` in `parts` whole numbers that differ by at most one."""
    for index in range(parts):
        yield total // parts + (index < total % parts)
