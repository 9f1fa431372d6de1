# SPDX-License-Identifier: Apache-2.0
"""Per-service look-ups: which Service addresses the kernel knows, and the few services that get a series of their own.

A sample never moves: a service that gets a series starts at zero from then on, what it had before stays in `~other`;
one that loses its series takes its samples out of sight, not into `~other`.
"""

import socket
import struct
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from kptrace.kernel.histogram import SERVICE_LADDER_NS
from kptrace.model.identity import ServiceAddress, ServicePort
from kptrace.model.metrics import OTHER, HistogramSample, MetricSpec
from kptrace.model.netfilter import DataPlane, IpFamily

MAX_SERVICES = 16384
#: Order of the data planes within a service's cells: number + 1 is patched into the programs.
PLANES = (DataPlane.NFTABLES, DataPlane.IPTABLES_NFT, DataPlane.IPTABLES_LEGACY, DataPlane.OTHER)
SLOTS = len(SERVICE_LADDER_NS) + 1
CELL_WORDS = SLOTS + 1
CELL_BYTES = CELL_WORDS * 8
NAMED_SERIES = 20
HOLD_SECONDS = 3600.0

SERVICE_SPEC = MetricSpec(
    "kptrace_service_lookup_duration_seconds",
    "histogram",
    "Look-up time of first packets to a known Service address, at the NAT chains of the hook where its address is"
    " translated; of dataplane cilium: the run of the program that a connect() to it waits for. The busiest 20 Service ports"
    " by name, the rest under ~other.",
    ("mechanism", "dataplane", "service_namespace", "service_name", "service_port", "protocol"),
)


def kernel_key(address: ServiceAddress) -> tuple[IpFamily, bytes]:
    """A Service address as the key of the kernel's map `services4` or `services6`: network byte order, zero padded."""
    if ":" in address.ip:
        packed = socket.inet_pton(socket.AF_INET6, address.ip)
        return IpFamily.IPV6, packed + struct.pack("!HB5x", address.port, address.protocol)
    return IpFamily.IPV4, socket.inet_pton(socket.AF_INET, address.ip) + struct.pack(
        "!HBx", address.port, address.protocol
    )


class ServiceNumbers:
    """A number for each Service port, kept for ever: its cells in the kernel never belong to another."""

    def __init__(self, limit: int = MAX_SERVICES) -> None:
        """Number at most `limit` Service ports."""
        self._limit = limit
        self._numbers: dict[ServicePort, int] = {}
        self.names: list[ServicePort] = []
        self.refused = 0

    def entries(self, services: Mapping[ServiceAddress, ServicePort]) -> dict[tuple[IpFamily, bytes], int]:
        """What the kernel's maps are to hold for these addresses."""
        wanted: dict[tuple[IpFamily, bytes], int] = {}
        self.refused = 0
        for address, port in services.items():
            number = self._number(port)
            if number is None or len(wanted) >= self._limit:
                self.refused += 1
            else:
                wanted[kernel_key(address)] = number
        return wanted

    def _number(self, port: ServicePort) -> int | None:
        number = self._numbers.get(port)
        if number is None and len(self.names) < self._limit:
            number = len(self.names)
            self._numbers[port] = number
            self.names.append(port)
        return number


@dataclass(slots=True)
class _Named:
    base: "array[int]"
    since: float
    rate: int = 0


class ServiceTop:
    """The bounded set of services with a series of their own, and what is left for `~other`. Pure but for its state."""

    def __init__(
        self,
        named: int = NAMED_SERIES,
        hold: float = HOLD_SECONDS,
        planes: tuple[DataPlane, ...] = PLANES,
    ) -> None:
        """Keep `named` series, each for at least `hold` seconds; `planes` are the cells that each service has."""
        self._planes = planes
        self._limit = named
        self._hold = hold
        self._named: dict[int, _Named] = {}
        # What was ever shown under a name, by data plane: the rest of the total is `~other`.
        self._retired: dict[int, array[int]] = {}
        self._before: dict[int, int] = {}

    def update(self, cells: "array[int]", used: int, now: float) -> None:
        """Choose the named services anew from the kernel's cells.

        Args:
            cells: all words of the map `service_cells`, at least for the first `used` service numbers.
            used: how many service numbers are given.
            now: seconds.
        """
        planes = len(self._planes)
        # Scrapes read in other threads: what they iterate over is replaced, never changed.
        self._named, self._retired = dict(self._named), dict(self._retired)
        counts: dict[int, int] = {}
        for cell in range(used * planes):
            total = sum(cells[cell * CELL_WORDS : cell * CELL_WORDS + SLOTS])
            if total:
                counts[cell] = total
        gains = {cell: total - self._before.get(cell, 0) for cell, total in counts.items()}
        self._before = counts
        for cell, named in self._named.items():
            named.rate = gains.get(cell, 0)
        waiting = sorted(
            (c for c, gain in gains.items() if gain and c not in self._named), key=lambda c: (-gains[c], c)
        )
        for cell in waiting:
            if len(self._named) >= self._limit and not self._evict(gains[cell], cells, now):
                break
            # The first to come have their samples whole; later ones leave what they had in `~other`.
            fresh = len(self._named) < self._limit and not self._retired
            start = array("Q", bytes(CELL_BYTES)) if fresh else _words(cells, cell)
            self._named[cell] = _Named(start, now)

    def _evict(self, gain: int, cells: "array[int]", now: float) -> bool:
        """Take the name from a service that had its time and is slower than the newcomer."""
        old = [(named.rate, cell) for cell, named in self._named.items() if now - named.since >= self._hold]
        if not old or min(old)[0] >= gain:
            return False
        cell = min(old)[1]
        plane = cell % len(self._planes)
        shown = _minus(_words(cells, cell), self._named.pop(cell).base)
        self._retired[plane] = _plus(self._retired.get(plane, array("Q", bytes(CELL_BYTES))), shown)
        return True

    def named(self, names: Sequence[ServicePort]) -> list[ServicePort]:
        """The services that have a series of their own now, each once."""
        return [names[number] for number in sorted({cell // len(self._planes) for cell in self._named})]

    def samples(
        self, cells: "array[int]", names: list[ServicePort], mechanism: str
    ) -> Iterable[HistogramSample]:
        """The named services' histograms, then `~other` of each data plane that has any."""
        planes = len(self._planes)
        for plane, dataplane in enumerate(self._planes):
            shown = self._retired.get(plane, array("Q", bytes(CELL_BYTES)))
            for cell, named in sorted(self._named.items()):
                if cell % planes != plane:
                    continue
                words = _minus(_words(cells, cell), named.base)
                shown = _plus(shown, words)
                if any(words):
                    port = names[cell // planes]
                    labels = (port.namespace, port.name, port.port, port.protocol.name)
                    yield _sample((mechanism, dataplane.value, *labels), words)
            total = array("Q", bytes(CELL_BYTES))
            for word in range(CELL_WORDS):
                total[word] = sum(
                    cells[plane * CELL_WORDS + word : len(names) * planes * CELL_WORDS : planes * CELL_WORDS]
                )
            rest = _minus(total, shown)
            if any(rest):
                yield _sample((mechanism, dataplane.value, OTHER, OTHER, OTHER, OTHER), rest)


def service_rows(
    cells: "array[int]",
    names: Sequence[ServicePort],
    service: tuple[str, str],
    planes: tuple[DataPlane, ...] = PLANES,
) -> list[Mapping[str, object]]:
    """Each port of a Service and data plane that had first packets: how many, their mean, and between what most were."""
    rows: list[Mapping[str, object]] = []
    for number, port in enumerate(names):
        if (port.namespace, port.name) != service:
            continue
        for plane, dataplane in enumerate(planes):
            words = _words(cells, number * len(planes) + plane)
            count = sum(words[:SLOTS])
            if count:
                edges = (0.0, *SERVICE_LADDER_NS, float("inf"))
                most = max(range(SLOTS), key=lambda slot: words[slot])
                rows.append(
                    {
                        "port": f"{port.port}/{port.protocol.name.lower()}",
                        "dataplane": dataplane.value,
                        "count": count,
                        "mean ns": round(words[SLOTS] / count),
                        "most above ns": edges[most],
                        "most up to ns": edges[most + 1],
                    }
                )
    return rows


def _words(cells: "array[int]", cell: int) -> "array[int]":
    return cells[cell * CELL_WORDS : (cell + 1) * CELL_WORDS]


def _minus(left: "array[int]", right: "array[int]") -> "array[int]":
    # A scrape reads while packets are counted: a word read later may be ahead of one read earlier, never behind zero.
    return array("Q", (max(0, a - b) for a, b in zip(left, right, strict=True)))


def _plus(left: "array[int]", right: "array[int]") -> "array[int]":
    return array("Q", (a + b for a, b in zip(left, right, strict=True)))


def _sample(labels: tuple[str, ...], words: "array[int]") -> HistogramSample:
    buckets, total = [], 0
    for slot, edge in enumerate([*(e / 1e9 for e in SERVICE_LADDER_NS), float("inf")]):
        total += words[slot]
        buckets.append((edge, total))
    return HistogramSample(labels, tuple(buckets), words[SLOTS] / 1e9)
