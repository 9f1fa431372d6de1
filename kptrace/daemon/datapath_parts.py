# SPDX-License-Identifier: Apache-2.0
"""The signals of Cilium's datapath as parts of the daemon: what is there, its runs, writes to its maps, what they program."""

from collections.abc import Mapping
from typing import Final

from kptrace.daemon.inventory_parts import INVENTORY, agent_off, start_agent
from kptrace.daemon.part import Node, Part, Running
from kptrace.daemon.settings import Settings, programming_off
from kptrace.dataplanes.cilium.detect import Datapath
from kptrace.dataplanes.cilium.layouts import Role
from kptrace.dataplanes.service_index import ServiceIndex
from kptrace.dataplanes.services_touched import index_of
from kptrace.identity.source import Identity
from kptrace.kernel.bytecode import Bytecode
from kptrace.model.errors import UnsupportedError
from kptrace.model.netfilter import IpFamily
from kptrace.model.rewrite import Rewrite
from kptrace.signals.datapath import DatapathSignal
from kptrace.signals.datapath_lookup import DatapathLookup
from kptrace.signals.datapath_lookup import Options as LookupOptions
from kptrace.signals.datapath_programming import DatapathProgramming
from kptrace.signals.datapath_statistics import DatapathStatistics
from kptrace.signals.datapath_statistics import Options as StatisticsOptions
from kptrace.signals.datapath_tracer import REQUEST as LOOKUP_REQUEST
from kptrace.signals.map_write import MapWriteSignal, Options
from kptrace.signals.map_write_kernel import REQUEST
from kptrace.signals.map_write_records import MapWrite, WatchedMap
from kptrace.signals.writers import parse_writer

_NUMBERS: Final = {role: number for number, role in enumerate(Role)}
_OF_BOTH: Final = "inet"
#: The agent's clean-up deletes connections by the ten thousand, which would crowd out what programs Services.
_NOT_WATCHED: Final = frozenset({Role.OTHER, Role.CT4, Role.CT6, Role.CT_ANY4, Role.CT_ANY6})


class _Names:
    """What the identity knows, as `datapath_programming.Names` wants it."""

    def __init__(self, identity: Identity) -> None:
        self._identity = identity

    @property
    def followed(self) -> bool:
        """Whether everything was listed."""
        return self._identity.followed

    def index(self) -> ServiceIndex:
        """All Service ports."""
        return index_of(self._identity.snapshot())


def watched(seen: Datapath) -> Mapping[int, WatchedMap]:
    """The maps whose writes are to be told, by the kernel's ids."""
    return {
        each.info.id: WatchedMap(
            _NUMBERS[role],
            role.value,
            _family(role),
            each.info.type,
            each.info.key_size,
            each.info.value_size,
        )
        for role, found in seen.maps.items()
        if role not in _NOT_WATCHED
        for each in found
    }


def _family(role: Role) -> str:
    for digit, family in (("4", IpFamily.IPV4), ("6", IpFamily.IPV6)):
        if digit in role.value:
            return family.value
    return _OF_BOTH


def _start(node: Node, _code: Bytecode) -> Running:
    datapath = DatapathSignal(node.loop, node.settings.host)
    node.stack.callback(datapath.close)
    node.shared.datapath = datapath
    datapath.start()
    return datapath


def _start_writes(node: Node, code: Bytecode) -> Running:
    shared = node.shared
    datapath = _datapath(node)

    def written(write: MapWrite) -> None:
        for listener in shared.map_written:
            listener(write)

    def rewritten(rewrite: Rewrite) -> None:
        for listener in shared.map_rewritten:
            listener(rewrite)

    def settled(until_ns: int) -> None:
        for listener in shared.map_settled:
            listener(until_ns)

    rules = tuple(parse_writer(text) for text in node.settings.writers)
    writes = MapWriteSignal(
        code,
        node.loop,
        node.settings.host,
        shared.processes,
        Options(rules, on_write=written, on_rewrite=rewritten, settled=settled),
    )
    node.stack.callback(writes.close)
    writes.attach()

    def seen(found: Datapath) -> None:
        writes.watch(watched(found))
        writes.agents([found.agent] if found.agent is not None else [])

    def follow() -> None:
        writes.follow()
        datapath.subscribe(seen)

    node.loop.call_soon_threadsafe(follow)
    shared.map_losses = writes.losses
    return writes


def _start_programming(node: Node, _code: Bytecode) -> Running:
    shared = node.shared
    datapath, losses = _datapath(node), shared.map_losses
    if losses is None:
        raise UnsupportedError(
            "the map write signal does not run: nothing tells when Cilium's maps are written"
        )
    signal = DatapathProgramming(
        _Names(node.identity),
        datapath.read_services,
        lost=lambda: sum(losses().values()),
        record=shared.recorder.change,
    )

    def follow() -> None:
        shared.map_written.append(signal.written)
        shared.map_settled.append(signal.settled)
        datapath.subscribe(signal.seen)
        node.identity.follow(signal.difference)
        shared.explain.append(signal.explain)

    node.loop.call_soon_threadsafe(follow)
    return signal


def _start_lookup(node: Node, code: Bytecode) -> Running:
    settings = node.settings
    datapath = _datapath(node)
    lookup = DatapathLookup(
        code, node.loop, settings.host, LookupOptions(settings.sampling, settings.overhead_budget)
    )
    node.stack.callback(lookup.close)
    lookup.start()

    def follow() -> None:
        datapath.subscribe(lookup.see)
        node.identity.subscribe(lookup.set_identity)
        lookup.set_identity(node.identity.snapshot())
        node.shared.explain.append(lookup.explain)

    node.loop.call_soon_threadsafe(follow)
    return lookup


def _start_statistics(node: Node, _code: Bytecode) -> Running:
    datapath = _datapath(node)
    always = node.settings.bpf_statistics == "always"
    statistics = DatapathStatistics(node.loop, StatisticsOptions(always=always))
    node.stack.callback(statistics.close)
    statistics.start()
    node.loop.call_soon_threadsafe(lambda: datapath.subscribe(statistics.see))
    return statistics


def _datapath(node: Node) -> DatapathSignal:
    if node.shared.datapath is None:
        raise UnsupportedError("the datapath signal does not run: nothing tells which programs are Cilium's")
    return node.shared.datapath


def _lookup_off(settings: Settings) -> str:
    return "--lookup-mechanism=off" if settings.lookup_mechanism == "off" else ""


def _statistics_off(settings: Settings) -> str:
    return _lookup_off(settings) or ("--bpf-statistics=off" if settings.bpf_statistics == "off" else "")


def _start_agent(node: Node, _code: Bytecode) -> Running:
    return start_agent(node, {number: role.value for role, number in _NUMBERS.items()})


def _off(settings: Settings) -> str:
    return "" if settings.rewrites else "--no-rewrites"


#: The first ones are nearly free; the others are late, since they are of no use where Cilium is not.
PARTS = (
    Part("datapath", "bpf_objects", None, _start),
    INVENTORY,
    Part("cilium_agent", "scrape", None, _start_agent, agent_off),
    Part(
        "datapath_lookup", "fentry", LOOKUP_REQUEST, _start_lookup, _lookup_off, alternative=True, late=True
    ),
    Part(
        "datapath_lookup", "bpf_stats", None, _start_statistics, _statistics_off, alternative=True, late=True
    ),
    Part("map_write", "tracepoint", REQUEST, _start_writes, _off, late=True),
    Part("datapath_programming", "map_write", None, _start_programming, programming_off, late=True),
)
