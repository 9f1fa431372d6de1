# SPDX-License-Identifier: Apache-2.0
"""What an event changes of what a Service is to have."""

from kptrace.identity.eligible import Place, Wanted, wanted
from kptrace.identity.records import PortRecord, ServiceRecord, SliceRecord
from kptrace.identity.store import Store
from kptrace.model.identity import Endpoint, Protocol
from kptrace.signals.programming_changes import changes_between
from kptrace.signals.programming_events import Change
from tests.unit.signals.programming_story import ADDED, CREATED, DELETED, REMOVED, V4, V6, WEB

ADDRESS = frozenset({("10.96.0.1", 80)})


def state(*ips: str, addresses: frozenset[tuple[str, int]] = ADDRESS) -> Wanted:
    """A Service port with these endpoints."""
    return Wanted(addresses, frozenset((ip, 8080) for ip in ips))


def end(kind: object, ip: str, **more: object) -> Change:
    """A change of an endpoint that arrived at 7."""
    return Change(kind, WEB, V4, 7, ip, 8080, **more)  # type: ignore[arg-type]


def test_endpoints_that_come_and_go_are_one_change_each() -> None:
    """Removals first; with the trigger's time; families apart."""
    before = {(WEB, V4): state("10.0.0.1", "10.0.0.2"), (WEB, V6): state("fd00::1")}
    after = {(WEB, V4): state("10.0.0.2", "10.0.0.3"), (WEB, V6): state("fd00::1")}
    assert changes_between(before, after, 7, 5) == (
        end(REMOVED, "10.0.0.1", trigger_ns=5),
        end(ADDED, "10.0.0.3", trigger_ns=5),
    )


def test_the_last_endpoint_leaves_the_service_port_bare() -> None:
    """Then iptables has no chain of it."""
    before, after = {(WEB, V4): state("10.0.0.1")}, {(WEB, V4): state()}
    assert changes_between(before, after, 7) == (end(REMOVED, "10.0.0.1", bare=True),)
    assert changes_between(after, before, 7) == (end(ADDED, "10.0.0.1"),)


def test_a_service_port_that_comes_or_goes_is_one_change() -> None:
    """With its endpoints and addresses; the trigger is none of a Service's."""
    there = {(WEB, V4): state("10.0.0.1")}
    addresses = tuple(ADDRESS)
    assert changes_between({}, there, 7, 5) == (Change(CREATED, WEB, V4, 7, addresses=addresses),)
    assert changes_between(there, {}, 7, 5) == (Change(DELETED, WEB, V4, 7, bare=True, addresses=addresses),)


def test_an_address_or_node_port_that_comes_or_goes_is_one_change() -> None:
    """Of the Service's kind."""
    more = frozenset({*ADDRESS, ("192.0.2.1", 80), ("", 30080)})
    before, after = {(WEB, V4): state("10.0.0.1")}, {(WEB, V4): state("10.0.0.1", addresses=more)}
    assert changes_between(before, after, 7) == (
        Change(CREATED, WEB, V4, 7, "", 30080),
        Change(CREATED, WEB, V4, 7, "192.0.2.1", 80),
    )
    found = changes_between(after, before, 7)
    assert {change.kind for change in found} == {DELETED}
    assert not any(change.whole for change in found)


def test_an_update_of_what_kube_proxy_does_not_look_at_changes_nothing() -> None:
    """The pod's name, hints that lead to the same, an endpoint that is not used here, a list of what was known."""
    port = PortRecord(WEB, "http", 80)
    service = ServiceRecord("demo", "web", 1, (port,), ("10.96.0.1",), 1)
    first = Endpoint("10.0.0.1", 8080, node="here")

    def at(*ends: Endpoint) -> Store:
        store = Store()
        store.apply(service)
        store.apply(SliceRecord("demo", "s", "web", ((("http", Protocol.TCP), ends),)))
        return store

    states = [
        wanted(store.service(("demo", "web")), store.slices_of(("demo", "web")), Place("here"))
        for store in (
            at(first),
            at(first._replace(pod="demo/p")),
            at(first, Endpoint("10.0.0.2", 8080, ready=False)),
        )
    ]
    assert changes_between(states[0], states[1], 7) == ()
    assert changes_between(states[1], states[2], 7) == ()
