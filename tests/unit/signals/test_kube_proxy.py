# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kptrace.model.metrics import Sample
from kptrace.model.rewrite import Outcome
from kptrace.model.signal import State
from kptrace.signals.kube_proxy import DIFFERENCE, SCRAPES, SYNCS, KubeProxySignal
from kptrace.signals.kube_proxy_page import Page, Syncs, Window, parse
from kptrace.signals.sync_events import Sync

# Lines of kube-proxy 1.36's own page.
METRICS = """\
# TYPE kubeproxy_sync_proxy_rules_duration_seconds histogram
kubeproxy_sync_proxy_rules_duration_seconds_bucket{ip_family="IPv4",le="0.001"} 0
kubeproxy_sync_proxy_rules_duration_seconds_sum{ip_family="IPv4"} 0.75
kubeproxy_sync_proxy_rules_duration_seconds_count{ip_family="IPv4"} 3
kubeproxy_sync_proxy_rules_duration_seconds_sum{ip_family="IPv6"} 0.05
kubeproxy_sync_proxy_rules_duration_seconds_count{ip_family="IPv6"} 1
kubernetes_build_info{build_date="",git_commit="",git_version="v1.36.3",major="1",minor="36"} 1
"""


class Now:
    """A loop that calls at once."""

    def call_soon_threadsafe(self, callback: Callable[[], None]) -> None:
        """Call."""
        callback()


def sync(seconds: float, writer: str = "kube-proxy", family: str = "ipv4") -> Sync:
    """A run of our own."""
    return Sync("nftables", family, writer, 1, 0, round(seconds * 1e9), Outcome.COMMITTED, {})


def values(signal: KubeProxySignal, name: str) -> dict[tuple[str, ...], float]:
    """The samples of one family."""
    (found,) = [family for family in signal.families() if family.spec.name == name]
    return {each.labels: each.value for each in found.samples if isinstance(each, Sample)}


def test_its_page_is_read() -> None:
    """Mode, version and syncs by family come from what kube-proxy says."""
    syncs = {"ipv4": Syncs(3, 0.75), "ipv6": Syncs(1, 0.05)}
    assert parse(METRICS, "nftables\n") == Page("nftables", "v1.36.3", syncs)


def test_an_old_kube_proxy_has_no_families() -> None:
    """Without the label its syncs are of all families."""
    text = METRICS.replace('{ip_family="IPv6"}', "")
    assert parse(text, "iptables").syncs["all"] == Syncs(1, 0.05)


@given(st.text(), st.text())
def test_any_page_is_read(metrics: str, mode: str) -> None:
    """Whatever answers at that port, nothing breaks, and no label becomes long."""
    prefix = "kubeproxy_sync_proxy_rules_duration_seconds_count "
    page = parse(f"{metrics}\n{prefix}{metrics}\n", mode)
    assert len(page.mode) <= 32
    assert len(page.version) <= 64


@given(
    theirs=st.lists(st.floats(0.01, 5), min_size=1, max_size=30),
    extra=st.floats(-0.005, 0.2),
    late=st.lists(st.integers(0, 2), min_size=31, max_size=31),
)
def test_a_difference_is_of_the_same_syncs(theirs: list[float], extra: float, late: list[int]) -> None:
    """However late we count what kube-proxy has counted, only intervals with the same syncs are compared."""
    window = Window()
    window.look(Syncs(), Syncs())
    for number in range(1, len(theirs) + 1):
        seen = max(0, number - late[number])
        ours = Syncs(seen, sum(theirs[:seen]) - extra * seen)
        window.look(Syncs(number, sum(theirs[:number])), ours)
        if window.difference is not None:
            assert window.difference == pytest.approx(extra, abs=1e-6)
    window.look(Syncs(len(theirs), sum(theirs)), Syncs(len(theirs), sum(theirs) - extra * len(theirs)))
    assert window.difference == pytest.approx(extra, abs=1e-6)


def test_a_sync_that_was_missed_ends_its_interval_only() -> None:
    """After so many looks the next interval begins; a kube-proxy that starts anew begins one too."""
    window = Window(longest=3)
    window.look(Syncs(5, 5.0), Syncs())
    for _ in range(3):
        window.look(Syncs(7, 9.0), Syncs(1, 1.0))
    assert window.difference is None
    window.look(Syncs(9, 11.0), Syncs(3, 2.0))
    assert window.difference == pytest.approx(0.5)
    window.look(Syncs(1, 1.0), Syncs(4, 2.5))
    window.look(Syncs(2, 3.0), Syncs(5, 3.5))
    assert window.difference == pytest.approx(1.0)


def test_looks_become_metrics_and_a_state() -> None:
    """Counts of both sides, their difference, failures and the state; syncs of other writers do not count."""
    signal = KubeProxySignal(lambda _: "", Now())
    assert signal.proxy() == ("", "")
    assert signal.states()[0].reason == "starting"
    signal.take(parse(METRICS, "nftables"))
    for run in (sync(0.1), sync(0.2), sync(9.0, "calico-node"), sync(9.0, family="ipv6")):
        signal.synced(run)
    signal.take(Page("nftables", "v1.36.3", {"ipv4": Syncs(5, 1.25), "ipv6": Syncs(1, 0.05)}))
    assert values(signal, DIFFERENCE.name) == {("ipv4",): pytest.approx(0.1)}
    assert values(signal, SYNCS.name) == {
        ("ipv4", "kube-proxy"): 5,
        ("ipv4", "kptrace"): 2,
        ("ipv6", "kube-proxy"): 1,
        ("ipv6", "kptrace"): 1,
    }
    signal.fail("refused")
    assert values(signal, SCRAPES.name) == {("ok",): 2, ("failed",): 1}
    (state,) = signal.states()
    assert (state.state, state.reason, state.detail) == (State.DEGRADED, "unreachable", "refused")
    assert signal.proxy() == ("nftables", "v1.36.3")
