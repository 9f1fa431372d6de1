# SPDX-License-Identifier: Apache-2.0
"""The endpoints of one EndpointSlice as a few bytes: a cluster has hundreds of thousands, and nearly all are at rest.

As objects, 240,000 endpoints of 8,000 Services took 105 MiB with all other names; packed, all take 22 MiB: pods, nodes and
addresses of a slice resemble each other, which deflate sees. Unpacking the 30 endpoints of a slice costs some 30
microseconds, and happens to slices that change and Services that are asked for.
"""

import sys
import zlib
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Final, NamedTuple

import msgspec

from kptrace.model.identity import NO_HINTS, Endpoint, Hints, Protocol

#: The name of a port and its protocol, as EndpointSlices refer to a Service's.
PortKey = tuple[str, Protocol]
#: Endpoints by port.
ByPort = tuple[tuple[PortKey, tuple[Endpoint, ...]], ...]
#: Address, node, pod, conditions, zones, nodes that it is meant for.
BackEnd = tuple[str, str, str, int, tuple[str, ...], tuple[str, ...]]

READY: Final = 1
SERVING: Final = 2
TERMINATING: Final = 4
_TOLD = tuple((bool(bits & READY), bool(bits & SERVING), bool(bits & TERMINATING)) for bits in range(8))

_LEVEL = 1


class _Port(msgspec.Struct, frozen=True, array_like=True):
    """One port; endpoints None: those of the port before it."""

    name: str
    protocol: int
    numbers: tuple[int, ...]
    back_ends: tuple[BackEnd, ...] | None


_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(tuple[_Port, ...])


class Packed(NamedTuple):
    """The endpoints of a slice.

    Attributes:
        data: all of them, compressed.
        ports: those that have any.
    """

    data: bytes = b""
    ports: tuple[PortKey, ...] = ()


NOTHING = Packed()


def pack(ports: Iterable[tuple[PortKey, int]], back_ends: tuple[BackEnd, ...]) -> Packed:
    """Pack a slice: every port, with its number, has all the back ends."""
    found: list[_Port] = []
    for (name, protocol), number in ports:
        found.append(_Port(name, protocol, (number,), None if found else back_ends))
    return _compressed(found)


def pack_endpoints(endpoints: ByPort) -> Packed:
    """Pack endpoints that are by port already, whatever they are."""
    found: list[_Port] = []
    before: tuple[BackEnd, ...] | None = None
    for (name, protocol), ends in endpoints:
        back_ends = tuple(
            (end.ip, end.node, end.pod, _conditions(end), end.hints.zones, end.hints.nodes) for end in ends
        )
        numbers = tuple(end.port for end in ends)
        shared = numbers[:1] if len(set(numbers)) == 1 else numbers
        found.append(_Port(name, protocol, shared, None if back_ends == before else back_ends))
        before = back_ends
    return _compressed(found)


def unpack(packed: Packed) -> ByPort:
    """What was packed."""
    if not packed.data:
        return ()
    found = []
    back_ends: tuple[BackEnd, ...] = ()
    for port in _DECODER.decode(zlib.decompress(packed.data)):
        if port.back_ends is not None:
            back_ends = port.back_ends
        numbers = port.numbers if len(port.numbers) == len(back_ends) else port.numbers * len(back_ends)
        key = sys.intern(port.name), Protocol(port.protocol)
        found.append((key, _endpoints(back_ends, numbers)))
    return tuple(found)


def addresses(packed: Packed) -> Iterator[str]:
    """The addresses of all back ends, without making endpoints of them."""
    for port in _DECODER.decode(zlib.decompress(packed.data)) if packed.data else ():
        yield from (back_end[0] for back_end in port.back_ends or ())


def _compressed(ports: list[_Port]) -> Packed:
    if not ports:
        return NOTHING
    keys: list[PortKey] = []
    some = False
    for port in ports:
        some = bool(port.back_ends) if port.back_ends is not None else some
        if some:
            keys.append((port.name, Protocol(port.protocol)))
    return Packed(zlib.compress(_ENCODER.encode(ports), _LEVEL), _shared(tuple(keys)))


@lru_cache(maxsize=1024)
def _shared(ports: tuple[PortKey, ...]) -> tuple[PortKey, ...]:
    """The same object for the same ports: most slices have one, of a few names."""
    return ports


def _conditions(end: Endpoint) -> int:
    return end.ready * READY | end.serving * SERVING | end.terminating * TERMINATING


def _endpoints(back_ends: tuple[BackEnd, ...], numbers: Iterable[int]) -> tuple[Endpoint, ...]:
    # Half the time of calling the class, and this is what following 100 changes a second mostly is.
    new, intern = tuple.__new__, sys.intern
    return tuple(
        new(
            Endpoint,
            (
                ip,
                number,
                intern(node),
                pod,
                *_TOLD[conditions],
                _hints(zones, nodes) if zones or nodes else NO_HINTS,
            ),
        )
        for (ip, node, pod, conditions, zones, nodes), number in zip(back_ends, numbers, strict=True)
    )


@lru_cache(maxsize=1024)
def _hints(zones: tuple[str, ...], nodes: tuple[str, ...]) -> Hints:
    """The same object for the same hints: there are many endpoints and few zones."""
    return Hints(zones, nodes)
