# SPDX-License-Identifier: Apache-2.0
"""Commits from rewrites and their bytes."""

from dataclasses import replace
from typing import Any

from kptrace.dataplanes.told import NOTHING_TOLD
from kptrace.model.netfilter import DataPlane, IpFamily
from kptrace.model.rewrite import Outcome, ProcessRun, Rewrite
from kptrace.signals.programming_commits import commits_of, failed_run
from tests.unit.dataplanes.captured import captured
from tests.unit.signals.programming_story import V4, WEB, Watch, change


def rewrite(plane: DataPlane, table: str, family: str = "ipv4", **more: Any) -> Rewrite:
    """A transaction of kube-proxy's from 100 to 120 ms."""
    base: dict[str, Any] = {"size": 100, "outcome": Outcome.COMMITTED, **more}
    return Rewrite(plane, family, table, "kube-proxy", ProcessRun(1), 100_000_000, 120_000_000, **base)


def test_an_nftables_batch_is_read() -> None:
    """And what it shows is matched."""
    data = captured("nft_endpoints")
    (found,) = commits_of(rewrite(DataPlane.NFTABLES, "kube-proxy", size=len(data)), data, 60_000_000)
    assert (found.family, found.begin_ns, found.end_ns, found.run_begin_ns) == (
        V4,
        10**8,
        12 * 10**7,
        6 * 10**7,
    )
    for number, fates in ((8080, ["programmed 30 exact"]), (80, [])):
        watch = Watch()
        assert watch.tell(replace(change(90, ip="10.244.1.11"), number=number), found) == fates


def test_a_batch_of_iptables_nft_is_read() -> None:
    """Of the table nat only."""
    data = captured("iptables_nft_endpoints")
    (found,) = commits_of(rewrite(DataPlane.IPTABLES_NFT, "nat", size=len(data)), data, None)
    assert found.run_begin_ns == found.begin_ns
    assert found.told.endpoint(WEB, "10.244.1.11", 8080)
    assert commits_of(rewrite(DataPlane.IPTABLES_NFT, "filter"), b"", None) == ()


def test_a_cut_batch_is_told_to_be_one() -> None:
    """By its size, or by what the reducer says; one that cannot be read at all may carry anything of its family."""
    for plane, table, name in (
        (DataPlane.NFTABLES, "kube-proxy", "nft_endpoints"),
        (DataPlane.IPTABLES_NFT, "nat", "iptables_nft_endpoints"),
    ):
        data = captured(name)
        for how in ({"size": len(data) + 1}, {"size": len(data), "truncated": True}):
            (found,) = commits_of(rewrite(plane, table, **how), data, None)
            assert found.told.touches(WEB, bare=False) is None
        (found,) = commits_of(rewrite(plane, table, truncated=True), b"", None)
        assert found.told is NOTHING_TOLD
    assert commits_of(rewrite(DataPlane.NFTABLES, "kube-proxy", "~several", truncated=True), b"", None) == ()
    assert commits_of(rewrite(DataPlane.NFTABLES, "other", truncated=True), b"", None) == ()


def test_of_legacy_tables_nat_counts() -> None:
    """The filter table's replacement comes just before, and carries no endpoint."""
    (found,) = commits_of(rewrite(DataPlane.IPTABLES_LEGACY, "nat", "ipv6"), b"", 200_000_000)
    assert found.family is IpFamily.IPV6
    assert found.told is NOTHING_TOLD
    assert found.run_begin_ns == found.begin_ns, "a run cannot begin after its transaction"
    assert commits_of(rewrite(DataPlane.IPTABLES_LEGACY, "filter"), b"", None) == ()
    assert commits_of(rewrite(DataPlane.OTHER, "nat"), b"", None) == ()


def test_a_run_that_failed_is_told_by_its_labels() -> None:
    """Those of a `Sync`; what has no family says nothing."""
    found = failed_run("nftables", "ipv4", "kube-proxy", 5, 9)
    assert found is not None
    assert (found.outcome, found.run_begin_ns, found.end_ns) == (Outcome.FAILED, 5, 9)
    assert failed_run("nftables", "~none", "kube-proxy", 5, 9) is None
    assert failed_run("other", "ipv4", "kube-proxy", 5, 9) is None
