# SPDX-License-Identifier: Apache-2.0
"""Programming latency of Cilium: changes of Services on one side, writes of an agent's on the other."""

from collections.abc import Callable, Iterable
from typing import Any

from kptrace.dataplanes.cilium.detect import Datapath, FoundMap
from kptrace.dataplanes.cilium.layouts import Role
from kptrace.dataplanes.cilium.service_state import FAMILY_OF, ServiceState
from kptrace.dataplanes.service_index import ServiceIndex
from kptrace.experiments.cilium_layouts import Version
from kptrace.experiments.cilium_writes import Write
from kptrace.identity.differences import Difference
from kptrace.identity.eligible import Wanted
from kptrace.kernel.objects import MapInfo
from kptrace.model.identity import Endpoint, Protocol, ServiceAddress, ServicePort
from kptrace.model.metrics import HistogramSample
from kptrace.model.netfilter import IpFamily
from kptrace.model.signal import State
from kptrace.signals.datapath_programming import MAX_BUFFERED, DatapathProgramming
from kptrace.signals.map_write_records import Command, MapWrite
from tests.unit.dataplanes.cilium.agent import Agent, role_of

MS = 1_000_000
WEB = ServicePort("demo", "web", "http", Protocol.TCP)
ADDRESS = ServiceAddress("10.96.0.10", 80, Protocol.TCP)
IDS = {role: number for number, role in enumerate(FAMILY_OF, 100)}


def ends(*numbers: int) -> list[Endpoint]:
    """Back ends of the Service."""
    return [Endpoint(f"10.0.0.{number}", 8080) for number in numbers]


class Node:
    """A node with an agent, its maps, and the signal; also the signal's `Names`.

    Attributes:
        readings: those that were asked for and are not done.
        now: CLOCK_MONOTONIC, ms.
    """

    followed = True

    def __init__(self, *numbers: int) -> None:
        """The Service has these back ends already."""
        self.agent = Agent()
        self.readings: list[Callable[[ServiceState, int], None]] = []
        self.lost = 0
        self.now = 0
        self.signal = DatapathProgramming(
            self,
            self.readings.append,
            lost=lambda: self.lost,
            clock=lambda: self.now * MS,
            unix=lambda at: at,
        )
        for _ in self.agent.update(ADDRESS, ends(*numbers)):
            pass

    def index(self) -> ServiceIndex:
        """See `datapath_programming.Names`."""
        index = ServiceIndex()
        index.add(WEB, [ADDRESS])
        return index

    def found(self, number: int = 0) -> Datapath:
        """What is seen of the maps; another `number` is another generation of them."""
        maps = {
            role: (
                FoundMap(
                    layout,
                    MapInfo(IDS[role] + number, 1, 12, 12, 65536, 0, layout.name[:15], 0, 0, 0),
                    layout.name,
                ),
            )
            for role, layout in self.agent.layouts.items()
        }
        return Datapath(maps, (), 7, ())

    def read(self, begin: int = 0) -> None:
        """The maps are read."""
        state = ServiceState(self.agent.layouts)
        for role, entries in self.agent.maps.items():
            state.load(role, entries.items())
        self.readings.pop()(state, begin * MS)

    def change(self, at: int, before: list[Endpoint], after: list[Endpoint]) -> None:
        """The API says so."""

        def wanted(found: list[Endpoint]) -> dict[tuple[ServicePort, IpFamily], Wanted]:
            where = frozenset((each.ip, each.port) for each in found)
            return {(WEB, IpFamily.IPV4): Wanted(frozenset({(ADDRESS.ip, ADDRESS.port)}), where)}

        self.signal.difference(Difference(wanted(before), wanted(after), at * MS))

    def write(self, at: int, after: list[Endpoint]) -> int:
        """The agent writes, one entry each millisecond; when it was done."""
        return self.tell(at, self.agent.table.update(ADDRESS, after))

    def tell(self, at: int, writes: Iterable[Write], *, truncated: bool = False, result: int = 0) -> int:
        """Hand over these writes."""
        for write in writes:
            role = role_of(write.map, Version.CURRENT)
            if role not in FAMILY_OF:
                continue
            at += 1
            if write.value is not None:
                self.agent.maps[role][write.key] = write.value
            else:
                self.agent.maps[role].pop(write.key, None)
            command = Command.DELETE if write.value is None else Command.UPDATE
            entries = ((write.key, write.value or b""),)
            self.signal.written(
                MapWrite(
                    at * MS - 1,
                    at * MS,
                    7,
                    7,
                    command,
                    0,
                    IDS[role],
                    result,
                    1,
                    int(result >= 0),
                    24,
                    entries,
                    truncated,
                )
            )
        return at

    def settle(self, until: int) -> dict[str, Any]:
        """Everything up to then was handed over; what /status says."""
        self.now = until
        self.signal.settled(until * MS)
        found: Any = self.signal.status(names=True).get("datapath programming", {})
        return dict(found)

    def durations(self) -> dict[tuple[str, ...], HistogramSample]:
        """The samples of programming durations."""
        return {
            sample.labels: sample
            for family in self.signal.families()
            for sample in family.samples
            if isinstance(sample, HistogramSample)
            and family.spec.name == "kptrace_programming_duration_seconds"
        }

    def state(self) -> tuple[State, str]:
        """Its state and reason."""
        (row,) = self.signal.states()
        return row.state, row.reason


def ready(*numbers: int) -> Node:
    """A node whose maps were read."""
    node = Node(*numbers)
    node.signal.seen(node.found())
    node.read()
    return node


def test_where_cilium_is_not_there_is_nothing() -> None:
    """No samples, no section, and changes are not kept."""
    node = Node()
    node.change(1000, [], ends(1))
    assert node.settle(3000) == {}
    assert list(node.signal.families()) == []
    assert node.state() == (State.OFF, "absent")


def test_one_to_forty_four_endpoints_are_forty_three_samples_of_one_write() -> None:
    """The master entry's write makes all of them reachable, and its end is the commit; removals likewise."""
    node = ready(1)
    assert node.state() == (State.ACTIVE, "ok")
    many = ends(*range(1, 45))
    node.change(1000, ends(1), many)
    done = node.write(1500, many)
    assert node.settle(done + 1000) | {
        "pending": 0,
        "programmed": 43,
        "by the transaction's bytes (exact)": 43,
    } == (node.settle(done + 2000))
    (labels, sample), *more = node.durations().items()
    assert labels == ("cilium", "ipv4", "endpoint_added", "exact")
    assert not more
    assert sample.count == 43
    assert 43 * 0.5 < sample.sum <= 43 * (done - 1000) / 1000
    node.change(5000, many, ends(1))
    node.write(5100, ends(1))
    node.settle(7000)
    assert node.durations()["cilium", "ipv4", "endpoint_removed", "exact"].count == 43


def test_a_write_that_the_kernel_refused_makes_nothing_true() -> None:
    """The change stays pending until the agent tries again."""
    node = ready(1)
    node.change(1000, ends(1), ends(1, 2))
    writes = list(node.agent.table.update(ADDRESS, ends(1, 2)))
    node.tell(1100, writes, result=-7)
    assert node.settle(3000)["pending"] == 1
    node.tell(4000, writes)
    assert node.settle(6000) | {"pending": 0, "programmed": 1} == node.settle(7100)


def test_after_a_lost_record_the_maps_are_read_again() -> None:
    """What is pending then may be true already: it is not measured; what comes later is."""
    node = ready(1)
    node.change(1000, ends(1), ends(1, 2))
    node.lost = 1
    assert node.settle(2000)["unmeasured"] == 1
    assert len(node.readings) == 1
    node.write(2100, ends(1, 2))  # waits, and is in what is read
    node.read(2050)
    node.change(3000, ends(1, 2), ends(1, 2, 3))
    done = node.write(3100, ends(1, 2, 3))
    assert node.settle(done + 1500)["programmed"] == 1


def test_a_copy_that_was_cut_is_a_lost_record() -> None:
    """Not all entries of a batch are known, so the maps are read again."""
    node = ready(1)
    writes = list(node.agent.table.update(ADDRESS, ends(1, 2)))
    node.tell(1000, writes[:1], truncated=True)
    assert len(node.readings) == 1


def test_writes_before_a_reading_began_are_in_it() -> None:
    """They come later than their time, and are not applied twice."""
    node = Node(1)
    node.signal.seen(node.found())
    assert node.state() == (State.DEGRADED, "reading")
    node.write(100, ends(1, 2))
    node.write(200, ends(1))
    node.read(150)
    assert node.state() == (State.ACTIVE, "ok")
    node.change(1000, ends(1), ends(1, 2))
    node.write(1100, ends(1, 2))
    assert node.settle(3000)["programmed"] == 1


def test_other_maps_than_before_are_read() -> None:
    """An agent that is upgraded makes new ones; those of the old ones' ids tell nothing any more."""
    node = ready(1)
    node.signal.seen(node.found())
    assert not node.readings
    node.signal.seen(node.found(50))
    assert len(node.readings) == 1
    node.read()
    node.change(1000, ends(1), ends(1, 2))
    node.write(1100, ends(1, 2))
    assert node.settle(3000)["pending"] == 1


def test_more_writes_than_fit_while_reading_are_a_reason_to_read_again() -> None:
    """The buffer is bounded."""
    node = Node(1)
    node.signal.seen(node.found())
    (write,) = list(node.agent.table.update(ADDRESS, ends(1)))[-1:]
    role = Role.LB4_SERVICES
    call = MapWrite(
        1, 2, 7, 7, Command.UPDATE, 0, IDS[role], 0, 1, 1, 24, ((write.key, write.value or b""),), False
    )
    for _ in range(MAX_BUFFERED + 1):
        node.signal.written(call)
    node.read()
    assert len(node.readings) == 1


def test_until_all_is_listed_it_is_degraded() -> None:
    """Writes are followed meanwhile, and no sample comes of them."""
    node = ready(1)
    node.followed = False  # type: ignore[misc]  # the API server is slow on this node alone
    assert node.state() == (State.DEGRADED, "starting")
    node.write(100, ends(1, 2))
    assert node.settle(2000)["writes with an effect"] == 0


def test_explain_tells_of_one_service() -> None:
    """Its last changes, and of others nothing."""
    node = ready(1)
    node.change(1000, ends(1), ends(1, 2))
    node.write(1100, ends(1, 2))
    node.settle(3000)
    (row,) = node.signal.explain("demo", "web")["datapath changes"]  # type: ignore[misc]  # a list
    assert (row["dataplane"], row["fate"], row["address"]) == ("cilium", "programmed", "10.0.0.2:8080")
    assert node.signal.explain("demo", "other") == {"datapath changes": []}
