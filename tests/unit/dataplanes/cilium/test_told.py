# SPDX-License-Identifier: Apache-2.0
"""What a write tells of Service ports, and what the programming signal's correlator makes of that."""

import pytest

from kptrace.dataplanes.cilium.service_effect import Effect, Frontend, FrontendChange
from kptrace.dataplanes.cilium.service_map import ServiceFlag
from kptrace.dataplanes.cilium.told import CiliumTold
from kptrace.dataplanes.service_index import ServiceIndex
from kptrace.dataplanes.told import Told
from kptrace.experiments.cilium_layouts import Version
from kptrace.model.identity import Endpoint, Protocol, ServiceAddress, ServicePort
from kptrace.model.netfilter import DataPlane, IpFamily
from kptrace.model.rewrite import Outcome
from kptrace.signals.programming_correlate import Correlator
from kptrace.signals.programming_events import Attribution, Change, ChangeKind, Commit, Fate, Result
from tests.unit.dataplanes.cilium.agent import Agent

WEB = ServicePort("demo", "web", "http", Protocol.TCP)
API = ServicePort("demo", "api", "https", Protocol.TCP)
NAMES = ServicePort("demo", "web", "http", Protocol.UDP)
CLUSTER_IP = ServiceAddress("10.96.0.10", 80, Protocol.TCP)
EXTERNAL = ServiceAddress("192.0.2.7", 80, Protocol.TCP)
NODE_PORT = 30080
A, B = ("10.0.0.1", 8080), ("10.0.0.2", 8080)


def index_of_web() -> ServiceIndex:
    """WEB with all kinds of addresses, and API with one of its own."""
    index = ServiceIndex()
    index.add(WEB, [CLUSTER_IP, EXTERNAL], NODE_PORT)
    index.add(API, [ServiceAddress("10.96.0.11", 443, Protocol.TCP)])
    return index


def told(
    ip: str = CLUSTER_IP.ip,
    port: int = 80,
    *,
    protocol: int = 6,
    flags: int = 0,
    present: bool = True,
    removed: frozenset[tuple[str, int]] = frozenset(),
    index: ServiceIndex | None = None,
) -> CiliumTold:
    """A write after which A is reachable at one frontend."""
    endpoints = frozenset({A}) if present else frozenset()
    change = FrontendChange(
        Frontend(ip, port, protocol), flags, present, not present, present, endpoints, removed, endpoints
    )
    return CiliumTold(Effect(IpFamily.IPV4, (change,)), index_of_web() if index is None else index)


def test_a_write_to_the_cluster_ip_tells_all_of_its_service_port() -> None:
    """Who is reachable, who is not, and that it is there; of others it tells that it has nothing to do with them."""
    made: Told = told(removed=frozenset({B}))
    assert made.touches(WEB, bare=False) is True
    assert made.endpoint(WEB, *A) is True
    assert made.endpoint(WEB, *B) is False
    assert made.mentions(WEB, *B) is True
    assert made.mentions(WEB, "10.0.0.9", 8080) is False
    assert made.present(WEB) is True
    assert made.address(WEB, CLUSTER_IP.ip, 80) is True
    assert made.address(WEB, EXTERNAL.ip, 80) is None
    for other in (API, NAMES):
        assert made.touches(other, bare=False) is False
        assert made.endpoint(other, *A) is None
        assert made.present(other) is None


@pytest.mark.parametrize(
    ("ip", "port", "flags", "asked"),
    [
        (EXTERNAL.ip, 80, ServiceFlag.EXTERNAL_IP, (EXTERNAL.ip, 80)),
        (EXTERNAL.ip, 80, ServiceFlag.LOADBALANCER, (EXTERNAL.ip, 80)),
        ("0.0.0.0", NODE_PORT, ServiceFlag.NODEPORT, ("", NODE_PORT)),
        ("172.18.0.2", NODE_PORT, ServiceFlag.NODEPORT | ServiceFlag.ROUTABLE, ("", NODE_PORT)),
    ],
)
def test_other_frontends_tell_of_their_address_only(
    ip: str, port: int, flags: int, asked: tuple[str, int]
) -> None:
    """The endpoints are told by the cluster IP alone, whichever of the frontends the agent writes first."""
    for present in (True, False):
        made = told(ip, port, flags=flags, present=present)
        assert made.touches(WEB, bare=False) is False
        assert made.endpoint(WEB, *A) is None
        assert made.address(WEB, *asked) is present
        assert made.address(WEB, CLUSTER_IP.ip, 80) is None
        assert made.ports() == {WEB}


def test_local_redirect_back_ends_are_not_the_services_own() -> None:
    """Such a policy has the cluster IP lead to pods of the node."""
    assert told(flags=ServiceFlag.LOCALREDIRECT).touches(WEB, bare=False) is False


def test_an_entry_for_any_protocol_is_that_of_each() -> None:
    """Before 1.17 the keys did not say which."""
    index = index_of_web()
    index.add(NAMES, [ServiceAddress(CLUSTER_IP.ip, 80, Protocol.UDP)])
    made = told(protocol=0, index=index)
    assert made.endpoint(WEB, *A) is True
    assert made.endpoint(NAMES, *A) is True
    assert told(index=index).touches(NAMES, bare=False) is False


def test_a_service_port_that_is_known_later_counts() -> None:
    """The agent may hear of a Service before we do; and one that is gone from the API is still asked for."""
    index = ServiceIndex()
    made = told(index=index)
    assert made.touches(WEB, bare=False) is False
    index.add(WEB, [CLUSTER_IP])
    assert made.touches(WEB, bare=False) is True
    index.remove(WEB)
    assert made.touches(WEB, bare=False) is True


class Run:
    """An agent whose writes go to a correlator: one every microsecond, each that does something a commit.

    Attributes:
        results: what became of the changes.
        now: the time.
        commits: when each effect's write was done.
    """

    def __init__(self, version: Version) -> None:
        self.agent = Agent(version)
        self.index = index_of_web()
        self.results: list[Result] = []
        self.correlator = Correlator(self.results.append, writers=["cilium-agent"])
        self.now = 1_000_000
        self.commits: list[int] = []

    def change(self, kind: ChangeKind, ip: str = "", number: int = 0) -> None:
        """WEB changes."""
        addresses = () if kind.of_endpoint else ((CLUSTER_IP.ip, 80), (EXTERNAL.ip, 80), ("", NODE_PORT))
        assert self.correlator.change(
            Change(kind, WEB, IpFamily.IPV4, self.now, ip, number, addresses=addresses)
        )

    def update(self, endpoints: list[Endpoint] | None) -> None:
        """The agent writes all frontends of WEB, or (None) deletes them; the cluster IP's not first."""
        for address, flags in ((EXTERNAL, ServiceFlag.LOADBALANCER), (CLUSTER_IP, 0)):
            effects = (
                self.agent.remove(address)
                if endpoints is None
                else self.agent.update(address, endpoints, flags)
            )
            for effect in effects:
                self.now += 1000
                if effect:
                    self.commits.append(self.now)
                    self.correlator.commit(
                        Commit(
                            DataPlane.CILIUM,
                            effect.family,
                            "cilium-agent",
                            Outcome.COMMITTED,
                            self.now - 500,
                            self.now,
                            self.now - 500,
                            CiliumTold(effect, self.index),
                        )
                    )


@pytest.mark.parametrize("version", [Version.CURRENT, Version.OLDER])
def test_every_endpoint_of_44_is_programmed_by_one_commit_and_exactly(version: Version) -> None:
    """One by one up, then one by one down: each change has the commit of the cluster IP's write, told by its bytes."""
    run = Run(version)
    endpoints = [Endpoint(f"10.0.0.{number}", 8080) for number in range(1, 45)]
    run.change(ChangeKind.SERVICE_ADDED)
    run.update(endpoints[:1])
    assert [result.change.kind for result in run.results] == [ChangeKind.SERVICE_ADDED]
    for kind, counts in (
        (ChangeKind.ENDPOINT_ADDED, range(2, 45)),
        (ChangeKind.ENDPOINT_REMOVED, range(43, 0, -1)),
    ):
        run.results.clear()
        for count in counts:
            subject = endpoints[count - 1 if kind.added else count]
            run.change(kind, subject.ip, subject.port)
            run.commits.clear()
            run.update(endpoints[:count])
            # The load balancer's address, then the cluster IP: the second one is what counts.
            assert len(run.commits) == 2
            result = run.results[-1]
            assert (result.fate, result.attribution) == (Fate.PROGRAMMED, Attribution.EXACT)
            assert result.commit is not None
            assert result.commit.end_ns == run.commits[1]
        assert len(run.results) == len(counts)
    run.results.clear()
    run.change(ChangeKind.SERVICE_REMOVED)
    run.update(None)
    assert [result.fate for result in run.results] == [Fate.PROGRAMMED]
    assert len(run.correlator) == 0


def test_an_agent_that_is_sooner_than_our_watch_is_found_by_looking_back() -> None:
    """The commit was told before the change: early, and by its bytes."""
    run = Run(Version.CURRENT)
    run.update([Endpoint(*A)])
    run.update([Endpoint(*A), Endpoint(*B)])
    run.now += 1_000_000
    run.change(ChangeKind.ENDPOINT_ADDED, *B)
    (result,) = run.results
    assert (result.fate, result.attribution) == (Fate.EARLY, Attribution.EXACT)


def test_other_writes_do_not_settle_a_change() -> None:
    """An endpoint that is not written yet stays pending, whatever else is written of its Service port."""
    run = Run(Version.CURRENT)
    run.update([Endpoint(*A)])
    run.change(ChangeKind.ENDPOINT_ADDED, *B)
    run.update([Endpoint(*A), Endpoint("10.0.0.3", 8080)])
    assert not run.results
    run.update([Endpoint(*A), Endpoint(*B)])
    assert [result.fate for result in run.results] == [Fate.PROGRAMMED]
