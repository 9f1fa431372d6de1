# SPDX-License-Identifier: Apache-2.0
"""The demo: each data plane at each size on a node of its own, with the real daemon beside it."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from kptrace.experiments import traffic
from kptrace.experiments.daemon_process import DaemonProcess, DaemonRequest, default_command
from kptrace.experiments.demo_result import DemoResult, LookupRow, RewriteRow
from kptrace.experiments.interrupts import interruptible
from kptrace.experiments.manifests import identity_text
from kptrace.experiments.node import EmbeddedNode
from kptrace.experiments.rulesets import DATA_PLANES, nat_chain
from kptrace.experiments.scrape import Distribution, Scrape
from kptrace.experiments.services import make_services
from kptrace.experiments.writer import RuleWriter
from kptrace.model.metrics import OTHER
from kptrace.model.netfilter import DataPlane, Hook, IpFamily

LOOKUP = "kptrace_lookup_duration_seconds"
REWRITE = "kptrace_rewrite_duration_seconds"
OBJECTS = "kptrace_rewrite_objects_total"
#: Everything that was not measured though it should have been.
LOSSES = ("kptrace_lookup_unpaired_total", "kptrace_events_lost_total")
_EXCERPT = (
    "kptrace_lookup_duration_seconds",
    "kptrace_rewrite_duration_seconds",
    "kptrace_service_lookup_duration",
)
_EXCERPT_LINES = 3
SERVICE = "kptrace_service_lookup_duration_seconds"
#: The daemon chooses the Services that it names every 10 s.
_NAMES_SECONDS = 12.0
_QUANTILES = (0.5, 0.99)
#: Clusters have Services inside and some that are reached from outside too. A third is a choice, not a measured share.
EXTERNAL_EVERY = 3


@dataclass(frozen=True, slots=True)
class Kept:
    """What `--keep` leaves running.

    Attributes:
        url: of the live daemon.
        netns: the node's namespace, for `nsenter --net=`.
        result: what was found.
    """

    url: str
    netns: Path
    result: DemoResult


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """What to run.

    Attributes:
        dataplanes, sizes: the cells: each data plane with each number of Services, in this order.
        endpoints: back ends of each Service.
        connections: TCP connections in each cell, to random ones of all the Services' addresses (a prime number: no
            multiple of anything).
        changes: one-endpoint changes in each cell, at least one. On a real node rules change while packets come, so a
            share of the connections is made after each.
        command: the daemon's command line.
        keep: called with the last cell's node still up; everything ends when it returns.
    """

    dataplanes: Sequence[DataPlane] = DATA_PLANES
    sizes: Sequence[int] = (100, 2000)
    endpoints: int = 2
    connections: int = 499
    changes: int = 29
    command: Callable[[DaemonRequest], list[str]] = default_command
    keep: Callable[[Kept], None] | None = None


@dataclass(frozen=True, slots=True)
class _Cell:
    lookup: LookupRow
    rewrite: RewriteRow
    startup_seconds: float
    losses: int
    metrics: tuple[str, ...]


def _labels(dataplane: DataPlane) -> dict[str, str]:
    table, chain = nat_chain(dataplane, Hook.PREROUTING)
    return {
        "dataplane": dataplane,
        "family": IpFamily.IPV4,
        "hook": Hook.PREROUTING.label,
        "table": table,
        "chain": chain,
        "walk": "first",
    }


def _named(scrape: Scrape) -> bool:
    return any(f'service_name="{OTHER}"' not in line for line in scrape.lines(f"{SERVICE}_count"))


def _excerpt(scrape: Scrape, dataplane: DataPlane) -> tuple[str, ...]:
    """The counts and sums of the metrics that the table is made of."""
    shown: list[str] = []
    for name in _EXCERPT:
        lines = [line for line in scrape.lines(name, dataplane=dataplane) if "_bucket{" not in line]
        shown += lines[:_EXCERPT_LINES]
    return tuple(shown)


def _measure(
    node: EmbeddedNode, daemon: DaemonProcess, dataplane: DataPlane, writer: RuleWriter, options: DemoOptions
) -> tuple[LookupRow, RewriteRow]:
    """Change endpoints, send a share of the connections after each change, and read what was measured of both."""
    table, _ = nat_chain(dataplane, Hook.PREROUTING)
    lookups = _labels(dataplane)
    rewrites = {"dataplane": dataplane, "table": table, "outcome": "committed"}
    addresses = [address for service in writer.services for address in service.addresses]
    chosen = iter(traffic.targets(addresses, options.connections))
    sources = traffic.client_sources(IpFamily.IPV4)
    before = daemon.scrape()
    sent, made = 0, 0
    shares = traffic.spread(options.connections, options.changes)
    for written, share in zip(writer.changing(options.changes), shares, strict=True):
        made += written.nat_commits
        sent += traffic.tcp_connections(node.client, list(islice(chosen, share)), sources).total

    def found(scrape: Scrape) -> tuple[Distribution, Distribution]:
        return (
            scrape.distribution(LOOKUP, **lookups).since(before.distribution(LOOKUP, **lookups)),
            scrape.distribution(REWRITE, **rewrites).since(before.distribution(REWRITE, **rewrites)),
        )

    def complete(scrape: Scrape) -> bool:
        packets, commits = found(scrape)
        return packets.count >= sent and commits.count >= made

    after = daemon.scrape_until(complete)
    packets, commits = found(after)
    objects = [scrape.total(OBJECTS, dataplane=dataplane, table=table) for scrape in (before, after)]
    size, changed = len(writer.services), round(objects[1] - objects[0])
    p50, p99 = (packets.quantile(q) * 1e9 for q in _QUANTILES)
    lookup = LookupRow(dataplane, size, sent, packets.count, p50, p99)
    p50, p99 = (commits.quantile(q) * 1e3 for q in _QUANTILES)
    return lookup, RewriteRow(dataplane, size, commits.count, made, p50, p99, changed)


@dataclass(frozen=True, slots=True)
class _Prefixed:
    """Progress of one cell."""

    tell: Callable[[str], None]
    prefix: str

    def __call__(self, text: str) -> None:
        self.tell(self.prefix + text)


def run_demo(options: DemoOptions, progress: Callable[[str], None]) -> DemoResult:
    """Run every cell and leave nothing behind, however it ends.

    Args:
        options: what to run.
        progress: told in one line what happens next.

    Raises:
        UnsupportedError: this machine lacks a tool, or its kernel something that the rules need.
        KptraceError: the daemon did not start, or a connection was not answered.
    """
    cells: list[_Cell] = []
    plan = [(dataplane, size) for dataplane in options.dataplanes for size in options.sizes]
    with interruptible():
        for number, (dataplane, size) in enumerate(plan, 1):
            say = _Prefixed(progress, f"[{number}/{len(plan)}] {dataplane}, {size} services: ")
            cells.append(_run_cell(dataplane, size, options, say, cells, final=number == len(plan)))
    return _result(cells)


def _result(cells: Sequence[_Cell]) -> DemoResult:
    return DemoResult(
        lookup=tuple(cell.lookup for cell in cells),
        rewrite=tuple(cell.rewrite for cell in cells),
        startup_seconds=max((cell.startup_seconds for cell in cells), default=0.0),
        losses=sum(cell.losses for cell in cells),
        metrics=cells[-1].metrics if cells else (),
    )


def _run_cell(
    dataplane: DataPlane,
    size: int,
    options: DemoOptions,
    progress: Callable[[str], None],
    done: Sequence[_Cell],
    *,
    final: bool,
) -> _Cell:
    """One data plane at one size, on a fresh node; the `final` one is shown, and kept if that is wanted."""
    with tempfile.TemporaryDirectory(prefix="kptrace-demo-") as name, EmbeddedNode() as node:
        folder = Path(name)
        services = make_services(size, options.endpoints, external_every=EXTERNAL_EVERY)
        progress("installing rules")
        writer = RuleWriter(node.node, dataplane)
        writer.install(services)
        request = DaemonRequest(node.node.path, folder / "identity.json", folder / "port")
        request.identity_file.write_text(identity_text(services), encoding="utf-8")
        progress("starting kptrace")
        with DaemonProcess(options.command(request), request.ready_file, folder / "log") as daemon:
            first = daemon.scrape()
            progress(f"{options.connections} connections between {options.changes} endpoint changes")
            lookup, rewrite = _measure(node, daemon, dataplane, writer, options)
            if final:
                progress("until the busiest services are named")
            last = daemon.scrape_until(_named, seconds=_NAMES_SECONDS) if final else daemon.scrape()
            losses = sum(last.total(name) - first.total(name) for name in LOSSES)
            excerpt = _excerpt(last, dataplane)
            cell = _Cell(lookup, rewrite, daemon.startup_seconds, round(losses), excerpt)
            if final and options.keep is not None:
                options.keep(Kept(daemon.url, node.node.path, _result([*done, cell])))
    return cell
