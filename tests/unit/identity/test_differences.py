# SPDX-License-Identifier: Apache-2.0
"""What messages change of what is to be programmed: once each, with the time and the annotation that they came with."""

from collections.abc import Iterable

from kptrace.identity.differences import CATCH_UP_SECONDS, MAX_KNOWN, Difference, Differences
from kptrace.identity.feed import Alive, Changed, Listed, Message, Trouble
from kptrace.identity.records import Kind, NodeRecord, PortRecord, Record, ServiceRecord, SliceRecord
from kptrace.identity.store import Event, Gone, Store
from kptrace.model.identity import Endpoint, Hints, Protocol, ServicePort
from kptrace.model.netfilter import IpFamily

WEB = ServicePort("demo", "web", "http", Protocol.TCP)
HTTP = ("http", Protocol.TCP)
SERVICE = ServiceRecord("demo", "web", 1, (PortRecord(WEB, "http", 80),), ("10.96.0.1",), 1)
SERVICES, SLICES, NODES = "watch_services", "watch_endpointslices", "watch_nodes"
KINDS = {SERVICES: Kind.SERVICES, SLICES: Kind.ENDPOINT_SLICES, NODES: Kind.NODES}


def ends(*last: int, zone: str = "") -> tuple[Endpoint, ...]:
    """Endpoints 10.0.0.LAST:8080."""
    return tuple(Endpoint(f"10.0.0.{n}", 8080, hints=Hints((zone,) if zone else ())) for n in last)


def piece(*endpoints: Endpoint, name: str = "web-a", trigger: int = 0) -> SliceRecord:
    """An EndpointSlice of `web`."""
    return SliceRecord("demo", name, "web", ((HTTP, endpoints),), trigger)


class Follower:
    """A store whose differences are written down."""

    def __init__(self, scopes: Iterable[str] = (SERVICES, SLICES, NODES), *, listens: bool = True) -> None:
        self.store = Store()
        self.differences = Differences(self.store, scopes, "here")
        self.told: list[Difference] = []
        if listens:
            self.differences.listen(self.told.append)

    def tell(self, *messages: Message) -> list[str]:
        """Tell these; the differences that came of them, in words."""
        before = len(self.told)
        for message in messages:
            self.differences.apply(message)
        return [_words(each) for each in self.told[before:]]

    def begin(self, *slices: SliceRecord, zone: str = "a") -> "Follower":
        """Everything is listed: the Service, its slices, and this node."""
        self.tell(listed(SERVICES, 0, SERVICE), listed(SLICES, 0, *slices), listed(NODES, 0, here(zone)))
        return self


def here(zone: str) -> NodeRecord:
    """This node."""
    return NodeRecord("here", (), zone)


def listed(scope: str, at: float, *records: Record) -> Listed:
    """A list."""
    return Listed(scope, at, KINDS[scope], records)


def changed(at: float, *events: Event, scope: str = SLICES) -> Changed:
    """What a watch says."""
    return Changed(scope, at, events)


def _words(difference: Difference) -> str:
    key = WEB, IpFamily.IPV4
    states = [
        " ".join(sorted(ip.rpartition(".")[2] for ip, _ in state[key].endpoints)) if key in state else "none"
        for state in (difference.before, difference.after)
    ]
    late = " late" if difference.late else ""
    return f"{' to '.join(states)} at {difference.received_ns / 1e9:g}{late}"


def test_the_first_lists_are_where_it_begins() -> None:
    """Nothing is told before Services, slices and this node are listed; what was listed is then what was before."""
    follower = Follower()
    assert follower.tell(listed(SLICES, 1, piece(*ends(1)))) == []
    assert follower.tell(changed(2, piece(*ends(1, 2)))) == []
    assert follower.tell(listed(SERVICES, 3, SERVICE)) == []
    assert not follower.differences.ready
    assert follower.tell(listed(NODES, 4)) == []
    assert follower.differences.ready
    assert follower.tell(changed(5.5, piece(*ends(2, 3)))) == ["1 2 to 2 3 at 5.5"]


def test_without_slices_nothing_is_ever_told() -> None:
    """Where they are not watched nobody knows what is to be programmed."""
    follower = Follower([SERVICES])
    follower.tell(listed(SERVICES, 0, SERVICE), changed(1, Gone(Kind.SERVICES, SERVICE.key), scope=SERVICES))
    assert follower.told == []
    assert not follower.differences.ready


def test_each_event_of_a_batch_is_told_by_itself() -> None:
    """Back-to-back writes that arrive together are as many differences."""
    follower = Follower().begin(piece(*ends(1)))
    found = follower.tell(changed(7, piece(*ends(1, 2)), piece(*ends(1, 2, 3))))
    assert found == ["1 to 1 2 at 7", "1 2 to 1 2 3 at 7"]


def test_a_service_that_comes_and_goes() -> None:
    """Its slices may come before it; without it they are for nobody."""
    follower = Follower().begin(piece(*ends(1)))
    gone = changed(3, Gone(Kind.SERVICES, SERVICE.key), scope=SERVICES)
    assert follower.tell(gone) == ["1 to none at 3"]
    assert follower.tell(changed(4, piece(*ends(2)))) == []
    assert follower.tell(changed(5, SERVICE, scope=SERVICES)) == ["none to 2 at 5"]


def test_what_kube_proxy_does_not_look_at_is_no_difference() -> None:
    """The same object again, another pod's name, a pod that is not ready."""
    follower = Follower().begin(piece(*ends(1)))
    named = Endpoint("10.0.0.1", 8080, pod="demo/p")
    idle = Endpoint("10.0.0.2", 8080, ready=False, serving=False)
    assert (
        follower.tell(changed(2, piece(*ends(1))), changed(3, piece(named)), changed(4, piece(named, idle)))
        == []
    )


def test_the_annotation_counts_where_it_is_new() -> None:
    """A slice that keeps its annotation tells of an old change by it, also where only the annotation came before."""
    follower = Follower().begin(piece(*ends(1), trigger=5))
    follower.tell(changed(1, piece(*ends(1, 2), trigger=5)), changed(2, piece(*ends(1, 2, 3), trigger=6)))
    follower.tell(changed(3, piece(*ends(1, 2, 3), trigger=7)), changed(4, piece(*ends(1), trigger=7)))
    follower.tell(changed(5, piece(*ends(9), name="web-b", trigger=7)))
    assert [each.trigger_ns for each in follower.told] == [0, 6, 0, 7]


def test_a_list_after_the_first_is_late() -> None:
    """It tells what changed since, of each Service once: not that an endpoint went from one slice to another."""
    follower = Follower().begin(piece(*ends(1, 2)), piece(*ends(3), name="web-b"))
    moved = (piece(*ends(1)), piece(*ends(2, 3), name="web-b"))
    assert follower.tell(listed(SLICES, 5, *moved)) == []
    assert follower.tell(listed(SLICES, 6, piece(*ends(1, 4), trigger=9))) == ["1 2 3 to 1 4 at 6 late"]
    assert follower.told[-1].trigger_ns == 0
    assert follower.tell(changed(7, piece(*ends(4)))) == ["1 4 to 4 at 7"]


def test_what_comes_right_after_a_broken_watch_is_late() -> None:
    """It may have waited for us; what comes later, and what another watch says, has not."""
    follower = Follower().begin(piece(*ends(1)))
    follower.tell(Trouble(SLICES, 10, "disconnected", ""))
    assert follower.tell(changed(11, SERVICE, scope=SERVICES)) == []
    follower.tell(Alive(SLICES, 20))
    assert follower.tell(changed(20.1, piece(*ends(1, 2)))) == ["1 to 1 2 at 20.1 late"]
    gone = changed(20.2, Gone(Kind.SERVICES, SERVICE.key), scope=SERVICES)
    assert follower.tell(gone) == ["1 2 to none at 20.2"]
    follower.tell(changed(20.3, SERVICE, scope=SERVICES))
    after = 20 + CATCH_UP_SECONDS
    assert follower.tell(changed(after, piece(*ends(1)))) == [f"1 2 to 1 at {after:g}"]


def test_the_nodes_zone_chooses_anew() -> None:
    """Where it changes, every Service whose endpoints are meant for a zone is to be programmed differently."""
    follower = Follower().begin(piece(*ends(1, zone="a"), *ends(2, zone="b")))
    assert follower.tell(changed(2, here("b"), scope=NODES)) == ["1 to 2 at 2"]
    assert follower.tell(changed(3, here("b"), scope=NODES)) == []
    assert follower.tell(changed(4, NodeRecord("there", (), "a"), scope=NODES)) == []


def test_more_services_than_are_kept_in_mind() -> None:
    """What was worked out last for a Service is forgotten, and worked out anew, without a difference."""
    follower = Follower()
    names = [f"s{number}" for number in range(MAX_KNOWN + 50)]
    ports = [ServicePort("demo", each, "http", Protocol.TCP) for each in names]
    records = [
        ServiceRecord(
            "demo", port.name, 1, (PortRecord(port, "http", 80),), (f"10.97.{n // 250}.{n % 250}",), 1
        )
        for n, port in enumerate(ports)
    ]
    follower.tell(listed(SERVICES, 0, *records), listed(SLICES, 0), listed(NODES, 0, here("a")))
    for at in (1, 2, 3):
        for name in names:
            slice_ = SliceRecord("demo", name, name, ((HTTP, ends(*range(at))),))
            follower.tell(changed(at, slice_))
    told = [
        {port.name: len(state.endpoints) for (port, _), state in side.items()}
        for each in follower.told
        for side in (each.before, each.after)
    ]
    assert told == [{name: at + more} for at in (0, 1, 2) for name in names for more in (0, 1)]


def test_without_a_listener_the_store_is_all_the_same() -> None:
    """Nothing is worked out, and what is known is what was said."""
    follower = Follower(listens=False).begin(piece(*ends(1)))
    follower.tell(changed(2, piece(*ends(1, 2))))
    assert set(follower.store.snapshot().endpoints[WEB]) == set(ends(1, 2))


def test_all_listeners_are_told() -> None:
    """Each data plane's signal has the same changes to account for."""
    follower = Follower()
    others: list[Difference] = []
    follower.differences.listen(others.append)
    follower.begin(piece(*ends(1))).tell(changed(2, piece(*ends(1, 2))))
    assert others == follower.told
    assert len(others) == 1
