# SPDX-License-Identifier: Apache-2.0
"""When a difference between the API and the rules counts."""

from hypothesis import given
from hypothesis import strategies as st

from kptrace.dataplanes.iptables.installed import InstalledIptables
from kptrace.dataplanes.iptables.services import endpoint_chains, service_chains
from kptrace.dataplanes.nftables.installed import InstalledNftables
from kptrace.model.identity import Protocol, ServicePort
from kptrace.model.netfilter import DataPlane, IpFamily
from kptrace.signals.drift import MAX_DIFFERENCES, NOT_INSTALLED, DriftTracker, differences, summary

PORT = ServicePort("ns", "web", "http", Protocol.TCP)
BASE = "ns/web/tcp/http"
ONE, TWO = ("10.0.0.1", 80), ("10.0.0.2", 80)
MINUTE = 60_000_000_000
NFT = DataPlane.NFTABLES


def nftables(*endpoints: tuple[str, int]) -> InstalledNftables:
    """A table in which the Service port has these."""
    return InstalledNftables(IpFamily.IPV4, {BASE: frozenset(endpoints)})


def test_what_is_the_same_is_no_difference() -> None:
    """Neither with endpoints nor, where there are no rules, without."""
    assert differences(PORT, {ONE, TWO}, nftables(TWO, ONE)) == frozenset()
    assert differences(PORT, frozenset(), InstalledNftables(IpFamily.IPV4)) == frozenset()


def test_each_endpoint_is_a_difference_of_its_own() -> None:
    """What lacks and what is there besides, and a Service port without rules as one."""
    assert differences(PORT, {ONE}, nftables(TWO)) == {"lacks 10.0.0.1:80", "has 10.0.0.2:80 besides"}
    assert differences(PORT, {ONE}, InstalledNftables(IpFamily.IPV4)) == {NOT_INSTALLED}
    assert differences(PORT, frozenset(), nftables(ONE)) == {"has 10.0.0.1:80 besides"}
    six = InstalledNftables(IpFamily.IPV6, {BASE: frozenset()})
    assert differences(PORT, {("fd00::1", 80)}, six) == {NOT_INSTALLED}
    many = {("10.0.1.1", number) for number in range(1, 500)}
    assert len(differences(PORT, many, nftables(ONE))) == MAX_DIFFERENCES


def test_what_could_not_be_read_is_not_judged() -> None:
    """A Service port that changed during every try of a reading has no difference."""
    reading = InstalledNftables(IpFamily.IPV4, {}, frozenset({BASE}))
    assert differences(PORT, {ONE}, reading) == frozenset()


def test_iptables_tells_by_the_names_of_chains() -> None:
    """An endpoint without its KUBE-SEP chain lacks; what else is there hashes do not tell."""
    chains = service_chains(PORT) | endpoint_chains(PORT, *ONE)
    assert differences(PORT, {ONE}, InstalledIptables(IpFamily.IPV4, chains)) == frozenset()
    assert differences(PORT, {TWO}, InstalledIptables(IpFamily.IPV4, chains)) == {"lacks 10.0.0.2:80"}
    assert differences(PORT, {ONE}, InstalledIptables(IpFamily.IPV4, {"KUBE-SERVICES"})) == {NOT_INSTALLED}


def test_only_what_lasts_is_drift() -> None:
    """The same difference in every reading for a minute; another one begins anew, one that was gone once too."""
    tracker = DriftTracker(IpFamily.IPV4, MINUTE)
    found = {0: {"a"}, 30: {"a", "b"}, 60: {"a", "b"}, 89: {"b"}, 90: {"a", "b"}}
    seen = {}
    for seconds, differing in found.items():
        at = seconds * 1_000_000_000
        tracker.note(PORT, differing, at)
        tracker.finish()
        seen[seconds] = [each.differences for each in tracker.drifting(at, NFT)]
    assert seen == {0: [], 30: [], 60: [("a",)], 89: [], 90: [("b",)]}


def test_a_reading_that_came_to_nothing_changes_nothing() -> None:
    """Differences go on lasting over it."""
    tracker = DriftTracker(IpFamily.IPV4, MINUTE)
    tracker.note(PORT, {"a"}, 0)
    tracker.finish()
    tracker.note(PORT, {"b"}, 1)
    tracker.abandon()
    (drift,) = tracker.drifting(MINUTE, NFT)
    assert (drift.differences, drift.since_ns) == (("a",), 0)
    rows = summary({IpFamily.IPV4: (drift,)})
    assert rows == [
        {"service": "ns/web:http/tcp", "family": "ipv4", "dataplane": "nftables", "differences": ["a"]}
    ]


@given(st.lists(st.sets(st.sampled_from("abc")), max_size=30))
def test_what_every_reading_of_a_minute_had_is_drift_and_nothing_else(readings: list[set[str]]) -> None:
    """Against a plain definition, ten seconds between readings."""
    tracker = DriftTracker(IpFamily.IPV4, MINUTE)
    for number, differing in enumerate(readings):
        tracker.note(PORT, differing, number * 10_000_000_000)
        tracker.finish()
        last = readings[max(0, number - 6) : number + 1]
        expected = set.intersection(*last) if len(last) == 7 else set()
        found = {
            each for drift in tracker.drifting(number * 10_000_000_000, NFT) for each in drift.differences
        }
        assert found == expected
