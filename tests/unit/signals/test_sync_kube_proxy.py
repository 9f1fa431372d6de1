# SPDX-License-Identifier: Apache-2.0
"""kube-proxy's runs, in its three modes, as strace and the kernel showed them for 1.36 (milliseconds)."""

import pytest

from kptrace.model.netfilter import DataPlane
from kptrace.model.rewrite import ObjectCount, Outcome
from kptrace.signals.sync_events import Phase
from tests.unit.signals.sync_story import (
    FAILED,
    KILLED,
    KUBE_PROXY,
    PROXY,
    SEGFAULT,
    Story,
    phases,
    summary,
    times,
)

NFTABLES = ("nftables", "ipv4", KUBE_PROXY)
LEGACY = ("iptables-legacy", "ipv4", KUBE_PROXY)
NFT = DataPlane.IPTABLES_NFT
JUMPS = 14


@pytest.fixture
def story() -> Story:
    """A node with kube-proxy."""
    return Story()


def partial(story: Story, at: float, family: str = "ip") -> None:
    """A partial sync in nftables mode, 1000 services: shared/facts' timeline, from the exec of the list on."""
    story.nft_list(at, at + 98.2, family)
    label = "ipv4" if family == "ip" else "ipv6"
    story.nft_write(at + 122.2, (at + 130.9, at + 132.1), at + 145.6, label)


def test_a_partial_sync_in_nftables_mode(story: Story) -> None:
    """Two processes: list, compute, write, commit and tear-down are told apart and add up."""
    partial(story, 8.0)
    assert story.tick(155) == []  # a clean-up of connections may follow
    (sync,) = story.tick(700)
    assert summary(sync) == (*NFTABLES, "committed")
    assert times(sync) == (8.0, 153.6)
    assert phases(sync) == {"list": 98.2, "compute": 24.0, "write": 8.7, "commit": 1.2, "teardown": 13.5}
    assert (sync.owner, sync.processes, sync.complete, len(sync.commits)) == (PROXY, 2, True, 1)


def test_stale_chains_are_deleted_in_the_same_run(story: Story) -> None:
    """The optional first write is its own transaction, of one run with the list and the write."""
    story.nft_write(0, (4, 5), 18)
    partial(story, 18.5)
    (sync,) = story.tick(1000)
    assert times(sync) == (0, 164.1)
    assert phases(sync) == {
        "write": 12.7,
        "commit": 2.2,
        "teardown": 26.5,
        "compute": 24.5,
        "list": 98.2,
    }
    assert [commit.begin_ns for commit in sync.commits] == [4_000_000, 149_400_000]


def test_failing_to_delete_stale_chains_does_not_fail_the_sync(story: Story) -> None:
    """Nothing tells its family: it belongs to the list that follows."""
    story.nft_write(0, None, 10, status=FAILED)
    partial(story, 10.5)
    (sync,) = story.tick(1000)
    assert summary(sync) == (*NFTABLES, "committed")
    assert sync.begin_ns == 0


def test_a_first_full_sync_lists_every_set(story: Story) -> None:
    """Seven sets and maps, then the table, then one long write."""
    for n, name in enumerate(("cluster-ips", "service-ips", "firewall-ips", "hairpin-connections")):
        story.run(f"nft --json list {'set' if n % 2 else 'map'} ip kube-proxy {name}", n * 10, n * 10 + 9)
    story.nft_list(40, 49)
    story.nft_write(60, (100, 2440), 2460)
    (sync,) = story.tick(4000)
    assert times(sync) == (0, 2460)
    assert phases(sync) == {"list": 45, "compute": 15, "write": 40, "commit": 2340, "teardown": 20}


def test_families_go_on_at_the_same_time(story: Story) -> None:
    """Each run's processes and transactions are its own, whatever the order, and an `nft -f -` has no family of its own."""
    story.run("nft --json --terse list table ip kube-proxy", 0, 100)
    story.run("nft --json --terse list table ip6 kube-proxy", 20, 90)
    six = story.start("nft -f -", 105)
    four = story.start("nft -f -", 110)
    story.commit(story.rewrite(four, 120, 130))
    story.commit(story.rewrite(six, 135, 136, "ipv6"))
    story.end(four, 140)
    story.end(six, 150)
    found = {sync.family: phases(sync) for sync in story.tick(2000)}
    assert found == {
        "ipv4": {"list": 100, "compute": 10, "write": 10, "commit": 10, "teardown": 10},
        "ipv6": {"list": 70, "compute": 15, "write": 30, "commit": 1, "teardown": 14},
    }


def test_stale_chains_of_one_family_are_not_the_write_of_the_other(story: Story) -> None:
    """While IPv4 computes, IPv6 deletes its stale chains."""
    story.nft_list(0, 100)
    story.nft_write(110, (112, 113), 125, "ipv6")
    story.nft_list(126, 200, "ip6")
    story.nft_write(190, (195, 196), 210)
    story.nft_write(220, (222, 224), 230, "ipv6")
    found = {sync.family: sync for sync in story.tick(3000)}
    assert {family: times(sync) for family, sync in found.items()} == {"ipv4": (0, 210), "ipv6": (110, 230)}
    assert [len(found[family].commits) for family in ("ipv4", "ipv6")] == [1, 2]


def test_back_to_back_syncs_are_told_apart_without_a_rest(story: Story) -> None:
    """With --nft-min-sync-period=0 the next run follows at once."""
    partial(story, 0)
    partial(story, 146)
    partial(story, 292)
    syncs = story.tick(5000)
    assert [times(sync) for sync in syncs] == [(0, 145.6), (146, 291.6), (292, 437.6)]


def test_a_failed_write_is_a_failed_sync_and_so_is_a_failed_retry(story: Story) -> None:
    """Mixed nft versions: list and write die of SIGSEGV, again 30 s later, and then it works."""
    for at in (0, 30_000):
        story.nft_list(at, at + 50, status=SEGFAULT)
        story.nft_write(at + 55, None, at + 105, status=SEGFAULT)
        # At -v=4 kube-proxy lists the table for people.
        story.run("nft list table kube-proxy", at + 106, at + 110, SEGFAULT)
        story.tick(at + 1000)
    partial(story, 60_000)
    syncs = story.tick(62_000)
    assert [summary(sync) for sync in syncs] == [
        (*NFTABLES, "failed"),
        (*NFTABLES, "failed"),
        (*NFTABLES, "committed"),
    ]
    assert phases(syncs[0]) == {"list": 50, "compute": 5, "write": 50}


@pytest.mark.parametrize("status", [FAILED, KILLED])
def test_a_batch_that_the_kernel_refused_is_a_failed_sync(story: Story, status: int) -> None:
    """Its transaction is known, so its commit phase is too."""
    story.nft_list(0, 100)
    story.nft_write(110, (112, 113), 120, status=status, outcome=Outcome.FAILED)
    (sync,) = story.tick(2000)
    assert summary(sync) == (*NFTABLES, "failed")
    assert phases(sync)["commit"] == 1


def test_the_stopped_nft_is_seen_while_it_hangs(story: Story) -> None:
    """SIGSTOP of the write process: the run grows, nothing is given up, and it ends as it should."""
    story.nft_list(0, 100)
    pid = story.start("nft -f -", 110)
    for now in (5_000, 20_000, 60_000):
        assert story.tick(now) == []
        assert story.running(now) == {KUBE_PROXY: now}
    story.commit(story.rewrite(pid, 60_100, 60_110))
    story.end(pid, 60_120)
    assert story.running(60_130) == {}
    (sync,) = story.tick(61_000)
    assert phases(sync)["write"] == 59_990
    assert sync.outcome is Outcome.COMMITTED


def test_a_list_that_hangs_is_seen_too(story: Story) -> None:
    """Whatever the phase, the gauge grows from the run's beginning."""
    story.start("nft --json --terse list table ip kube-proxy", 0)
    story.tick(45_000)
    assert story.running(45_000) == {KUBE_PROXY: 45_000}


def test_the_computing_kube_proxy_is_seen_while_it_does(story: Story) -> None:
    """Between list and write there is no process, but a run."""
    story.nft_list(0, 100)
    story.tick(10_000)
    assert story.running(10_000) == {KUBE_PROXY: 10_000}


def test_a_write_that_found_nothing_to_change_is_empty(story: Story) -> None:
    """kube-proxy starts `nft -f -` even with nothing to say: no transaction, exit code 0."""
    story.nft_list(0, 100)
    story.nft_write(101, None, 105)
    (sync,) = story.tick(2000)
    assert summary(sync) == (*NFTABLES, "empty")


def test_after_a_loss_it_is_unknown_whether_there_was_nothing_to_change(story: Story) -> None:
    """The transaction may be what was lost."""
    story.nft_list(0, 100)
    story.reducer.lost()
    story.nft_write(101, None, 105)
    (sync,) = story.tick(2000)
    assert summary(sync) == (*NFTABLES, "unknown")
    assert not sync.complete


def test_a_list_without_a_write_is_unknown(story: Story) -> None:
    """kube-proxy always writes: nobody saw it."""
    story.nft_list(0, 100)
    assert story.tick(29_000) == []
    (sync,) = story.tick(31_000)
    assert summary(sync) == (*NFTABLES, "unknown")


def test_lists_by_netlink_stand_for_the_process(story: Story) -> None:
    """kube-proxy 1.37 lists by dumps of its own: one list from the first to the last, then the write process."""
    story.span(PROXY, Phase.LIST, 0, 20, "ipv4")
    story.span(PROXY, Phase.LIST, 25, 40, "ipv4")
    story.nft_write(50, (55, 56), 60)
    story.span(PROXY, Phase.LIST, 65, 70, "ipv4")
    first, second = story.tick(40_000)
    assert times(first) == (0, 60)
    assert phases(first) == {"list": 40, "compute": 10, "write": 5, "commit": 1, "teardown": 4}
    assert first.processes == 1
    assert second.outcome is Outcome.UNKNOWN


def test_dumps_whose_end_is_unknown_are_a_list_up_to_the_last_request(story: Story) -> None:
    """Then the last dump counts as computing."""
    for at in (0, 12, 20):
        story.span(PROXY, Phase.LIST, at, at, "ipv4")
    story.nft_write(50, (55, 56), 60)
    (sync,) = story.tick(1000)
    assert phases(sync) == {"list": 20, "compute": 30, "write": 5, "commit": 1, "teardown": 4}


def test_a_list_that_is_told_of_while_it_lasts_is_one(story: Story) -> None:
    """Pieces of dumps, many more than a run has steps; the next run's list is not of the run before."""
    for n in range(1000):
        story.span(PROXY, Phase.LIST, n * 10, n * 10 + 8, "ipv4")
        story.span(PROXY, Phase.LIST, n * 10 + 8, n * 10 + 9, "ipv4")
        if n % 50 == 0:
            assert story.tick(n * 10 + 9) == []
    story.nft_write(10_050, (10_055, 10_056), 10_060)
    story.span(PROXY, Phase.LIST, 10_070, 10_080, "ipv4")
    story.nft_write(10_090, (10_095, 10_096), 10_099)
    first, second = story.tick(20_000)
    assert phases(first) == {"list": 9999, "compute": 51, "write": 5, "commit": 1, "teardown": 4}
    assert times(second) == (10_070, 10_099)
    assert not any(story.reducer.losses.values())


def test_families_that_are_listed_at_once_by_netlink_are_two_runs(story: Story) -> None:
    """kube-proxy 1.37 does so for both of its families."""
    for n in range(5):
        story.span(PROXY, Phase.LIST, n * 10, n * 10 + 9, "ipv4")
        story.span(PROXY, Phase.LIST, n * 10 + 5, n * 10 + 12, "ipv6")
    story.nft_write(60, (62, 63), 65)
    story.nft_write(64, (66, 67), 70, "ipv6")
    found = {sync.family: times(sync) for sync in story.tick(1000)}
    assert found == {"ipv4": (0, 65), "ipv6": (5, 70)}


def test_a_stale_delete_before_a_list_by_netlink_is_of_its_run(story: Story) -> None:
    """As before a list by nft."""
    story.nft_write(0, (4, 5), 18)
    story.span(PROXY, Phase.LIST, 20, 30, "ipv4")
    story.nft_write(40, (45, 46), 50)
    (sync,) = story.tick(1000)
    assert (times(sync), len(sync.commits)) == ((0, 50), 2)
    assert phases(sync)["list"] == 10


@pytest.mark.parametrize("stale", [False, True])
def test_where_the_list_cannot_be_seen_the_writes_are_the_run(story: Story, stale: bool) -> None:
    """One or two `nft -f -` within half a second."""
    if stale:
        story.nft_write(0, (4, 5), 18)
    story.nft_write(40, (45, 46), 50)
    story.nft_write(1200, (1205, 1206), 1210)
    syncs = story.tick(5000)
    assert [times(sync) for sync in syncs] == [(0 if stale else 40, 50), (1200, 1210)]


def test_connections_are_cleaned_up_in_the_run(story: Story) -> None:
    """After the write, by kube-proxy itself: the run is longer by it."""
    partial(story, 0)
    story.span(PROXY, Phase.CONNTRACK, 150, 180.6, "ipv4")
    (sync,) = story.tick(2000)
    assert times(sync) == (0, 180.6)
    assert phases(sync)["conntrack"] == 30.6
    assert phases(sync)["compute"] == 28.4


def test_very_many_connections_are_cleaned_up_in_one_run(story: Story) -> None:
    """Pieces of a clean-up that takes seconds are one, whatever their number."""
    partial(story, 0)
    for n in range(1000):
        story.span(PROXY, Phase.CONNTRACK, 150 + n * 10, 156 + n * 10, "ipv4")
        if n % 50 == 0:
            assert story.tick(156 + n * 10) == []
    (sync,) = story.tick(20_000)
    assert sync.end_ns == 10_146_000_000
    assert phases(sync)["conntrack"] == 9996
    assert not any(story.reducer.losses.values())


def test_connections_are_cleaned_up_by_a_tool_in_older_versions(story: Story) -> None:
    """One `conntrack -D` for each service."""
    story.restore(0, [(2, 3), (4, 5)], 6)
    for n in range(3):
        story.run("conntrack -D --orig-dst 10.0.0.1 -p udp", 10 + n * 10, 15 + n * 10)
    (sync,) = story.tick(2000)
    assert times(sync) == (0, 35)
    assert phases(sync)["conntrack"] == 15


def test_a_clean_up_of_connections_without_a_run_is_none(story: Story) -> None:
    """At start, or long after a run."""
    story.span(PROXY, Phase.CONNTRACK, 0, 10, "ipv4")
    story.run("conntrack -D -p udp", 20, 30)
    assert story.tick(40_000) == []


def full_iptables(story: Story, at: float, tool: str = "iptables") -> float:
    """Jump rules of a full sync: they are there, so that each costs two processes; returns the end."""
    for n in range(JUMPS):
        story.run(f"{tool} -w 5 -N KUBE-SERVICES -t nat", at + n * 10, at + n * 10 + 4, FAILED)
        story.run(f"{tool} -w 5 -C PREROUTING -t nat -j KUBE-SERVICES", at + n * 10 + 5, at + n * 10 + 9)
    return at + JUMPS * 10


def test_a_full_sync_in_iptables_mode(story: Story) -> None:
    """Many processes, iptables-save, and one iptables-restore with two transactions."""
    at = full_iptables(story, 0)
    story.run("iptables-save -t nat", at, at + 20)
    story.restore(at + 30, [(at + 32, at + 32.1), (at + 60, at + 80)], at + 84)
    (sync,) = story.tick(5000)
    assert summary(sync) == (*LEGACY, "committed")
    assert times(sync) == (0, at + 84)
    assert sync.processes == 2 * JUMPS + 2
    found = phases(sync)
    assert found["commit"] == pytest.approx(20.1)
    assert found["teardown"] == 4
    assert found["list"] == JUMPS * 4 + 20


def test_jump_rules_that_lack_are_part_of_the_full_sync(story: Story) -> None:
    """Chains and rules that are made one by one commit one by one."""
    made = story.start("iptables -w 5 -N KUBE-SERVICES -t nat", 0)
    story.commit(story.rewrite(made, 2, 3, plane=DataPlane.IPTABLES_LEGACY, table="nat"))
    story.end(made, 5)
    story.run("iptables -w 5 -C PREROUTING -t nat -j KUBE-SERVICES", 6, 8, FAILED)
    added = story.start("iptables -w 5 -I PREROUTING -t nat -j KUBE-SERVICES", 9)
    story.commit(story.rewrite(added, 11, 12, plane=DataPlane.IPTABLES_LEGACY, table="nat"))
    story.end(added, 14)
    story.restore(20, [(22, 23), (24, 26)], 28)
    (sync,) = story.tick(2000)
    assert len(sync.commits) == 4
    assert phases(sync) == {"write": 7, "commit": 5, "teardown": 6, "compute": 8, "list": 2}


def test_an_empty_batch_of_a_reader_is_no_transaction_of_the_run(story: Story) -> None:
    """`iptables-nft -C` sends one; of `-N` for a chain that is there it says that nothing was to do."""
    for n, command in enumerate(("-N KUBE-SERVICES", "-C PREROUTING -j KUBE-SERVICES")):
        pid = story.start(f"iptables -w 5 {command} -t nat", n * 10)
        empty = story.rewrite(pid, n * 10 + 2, n * 10 + 3, "~none", outcome=Outcome.EMPTY, table="~none")
        story.commit(empty)
        story.end(pid, n * 10 + 5)
    story.restore(20, [(22, 23), (24, 25)], 30, plane=NFT)
    (sync,) = story.tick(1000)
    assert [commit.outcome.value for commit in sync.commits] == ["empty", "committed", "committed"]
    assert phases(sync)["list"] == 5
    assert summary(sync) == ("iptables-nft", "ipv4", KUBE_PROXY, "committed")


@pytest.mark.parametrize("plane", [DataPlane.IPTABLES_LEGACY, NFT])
def test_a_partial_sync_in_iptables_mode(story: Story, plane: DataPlane) -> None:
    """With more than 1000 endpoints it is one process, with both back ends two transactions."""
    story.restore(11.1, [(13.1, 13.2), (41.1, 60.9)], 63.9, plane=plane)
    (sync,) = story.tick(1000)
    assert summary(sync) == (plane.value, "ipv4", KUBE_PROXY, "committed")
    assert phases(sync) == {"write": pytest.approx(29.9), "commit": pytest.approx(19.9), "teardown": 3.0}
    assert [commit.table for commit in sync.commits] == ["filter", "nat"]


def test_a_wait_for_the_lock_is_not_writing(story: Story) -> None:
    """Where the lock's signal tells of it."""
    pid = story.start("iptables-restore -w 5 --noflush --counters", 0)
    story.span(pid, Phase.LOCK_WAIT, 2, 1002)
    story.commit(story.rewrite(pid, 1010, 1020, plane=DataPlane.IPTABLES_LEGACY, table="nat"))
    story.end(pid, 1021)
    (sync,) = story.tick(3000)
    assert phases(sync) == {"write": 10, "lock_wait": 1000, "commit": 10, "teardown": 1}


def test_a_restore_that_fails_between_its_tables_is_failed(story: Story) -> None:
    """Filter was committed, nat was not: the services are not what they should be."""
    story.restore(0, [(2, 3), (4, 5)], 6, status=FAILED, outcomes=(Outcome.COMMITTED, Outcome.FAILED))
    (sync,) = story.tick(1000)
    assert summary(sync) == (*LEGACY, "failed")


def test_a_restore_that_does_not_get_the_lock_is_failed(story: Story) -> None:
    """Exit code 4, no transaction; which back end it is, is known from the run before."""
    story.restore(0, [(2, 3), (4, 5)], 6)
    story.run("iptables-restore -w 5 --noflush --counters", 2000, 7000, 4 << 8)
    _, sync = story.tick(9000)
    assert summary(sync) == (*LEGACY, "failed")
    assert phases(sync) == {"write": 5000}


def test_families_in_iptables_mode_go_on_at_the_same_time(story: Story) -> None:
    """The tool's name tells the family."""
    story.run("iptables-save -t nat", 0, 50)
    story.run("ip6tables-save -t nat", 10, 40)
    story.restore(60, [(61, 62), (63, 64)], 70, six=True)
    story.restore(65, [(66, 67), (68, 69)], 75)
    assert {sync.family: times(sync) for sync in story.tick(1000)} == {"ipv4": (0, 75), "ipv6": (10, 70)}


def test_canaries_are_no_syncs(story: Story) -> None:
    """Neither when they are made, nor when they are asked for, nor while a real run goes on."""
    for n, table in enumerate(("mangle", "nat", "filter")):
        pid = story.start(f"iptables -w 5 -N KUBE-PROXY-CANARY -t {table}", n * 10)
        rewrite = story.rewrite(pid, n * 10 + 1, n * 10 + 2, plane=DataPlane.IPTABLES_LEGACY, table=table)
        story.commit(rewrite)
        story.end(pid, n * 10 + 3)
    story.run("iptables -w 5 -S KUBE-PROXY-CANARY -t mangle", 30_000, 30_005)
    assert story.running(30_010) == {}
    story.run("iptables -w 5 -S KUBE-PROXY-CANARY -t mangle", 60_000, 60_005)
    assert story.tick(120_000) == []


def test_the_clean_up_of_iptables_in_nftables_mode_is_no_sync(story: Story) -> None:
    """About 38 processes, with transactions where an older kube-proxy left rules."""
    for tool in ("iptables", "ip6tables"):
        story.run(f"{tool} --version", 0, 1)
        story.run(f"{tool} -S POSTROUTING -t nat", 2, 3)
        for n in range(12):
            story.run(
                f"{tool} -w 5 -C PREROUTING -t nat -j KUBE-SERVICES", 10 + n * 5, 12 + n * 5, n % 2 * FAILED
            )
            story.run(f"{tool} -w 5 -D PREROUTING -t nat -j KUBE-SERVICES", 12 + n * 5, 14 + n * 5)
        for n, table in enumerate(("nat", "filter")):
            story.run(f"{tool}-save -t {table}", 100 + n * 50, 110 + n * 50)
            story.restore(
                120 + n * 50,
                [(122 + n * 50, 123 + n * 50)],
                130 + n * 50,
                six=tool == "ip6tables",
                arguments=f"-w 5 -T {table} --noflush --counters",
            )
        story.run(f"{tool} -w 5 -X KUBE-PROXY-CANARY -t mangle", 300, 302)
    story.run("modprobe -va ip_vs", 303, 305)
    story.run("nft --version", 306, 307)
    story.run("nft --check -f -", 308, 310)
    assert story.running(320) == {}
    assert story.tick(120_000) == []


@pytest.mark.parametrize("left", [False, True])
def test_the_clean_up_of_nftables_in_iptables_mode_is_no_sync(story: Story, left: bool) -> None:
    """A table is deleted, or the deletion fails because there is none; the first full sync follows."""
    for n, family in enumerate(("ipv4", "ipv6")):
        story.run("nft --version", n * 100, n * 100 + 1)
        checked = story.start("nft --check -f -", n * 100 + 2)
        story.commit(story.rewrite(checked, n * 100 + 3, n * 100 + 4, family, outcome=Outcome.CHECKED))
        story.end(checked, n * 100 + 5)
        pid = story.start("nft -f -", n * 100 + 10)
        if left:
            gone = (ObjectCount(family, "kube-proxy", "table", "delete", 1),)
            story.commit(story.rewrite(pid, n * 100 + 11, n * 100 + 12, family, objects=gone))
        story.end(pid, n * 100 + 20, 0 if left else FAILED)
    at = full_iptables(story, 300)
    story.restore(at, [(at + 1, at + 2), (at + 3, at + 4)], at + 5)
    (sync,) = story.tick(120_000)
    assert summary(sync) == (*LEGACY, "committed")


def test_kube_proxy_that_dies_in_a_run_failed(story: Story) -> None:
    """Killed while it computes: what it wanted to write was not written. The next one starts anew."""
    story.nft_list(0, 100)
    story.end(PROXY, 150, KILLED)
    story.tick(1000)
    story.owner = 200
    partial(story, 3000)
    syncs = story.tick(5000)
    assert [(sync.owner, sync.outcome.value) for sync in syncs] == [(PROXY, "failed"), (200, "committed")]


def test_a_write_outlives_its_kube_proxy(story: Story) -> None:
    """Its orphan commits, and then the run is what it is."""
    story.nft_list(0, 100)
    pid = story.start("nft -f -", 110)
    story.end(PROXY, 120, KILLED)
    story.commit(story.rewrite(pid, 130, 140))
    story.end(pid, 150)
    (sync,) = story.tick(2000)
    assert summary(sync) == (*NFTABLES, "committed")


def test_the_first_sync_after_a_restart_is_long(story: Story) -> None:
    """Over an existing table of 5000 services one call takes 6 s: seen meanwhile, and then as its commit."""
    story.nft_list(0, 1132)
    pid = story.start("nft -f -", 2000)
    story.tick(8000)
    assert story.running(8000) == {KUBE_PROXY: 8000}
    story.commit(story.rewrite(pid, 2200, 8460))
    story.end(pid, 8480)
    (sync,) = story.tick(9999)
    assert phases(sync)["commit"] == 6260


def test_without_command_lines_runs_are_still_found(story: Story) -> None:
    """What commits was a write, what ended well without was a list: of the family that is written next."""
    story.run("nft --json list table ip kube-proxy", 0, 100, argv=False)
    pid = story.start("nft -f -", 110, argv=False)
    story.commit(story.rewrite(pid, 120, 121))
    story.end(pid, 130)
    (sync,) = story.tick(2000)
    assert phases(sync) == {"list": 100, "compute": 10, "write": 10, "commit": 1, "teardown": 9}


def test_a_wrapper_that_becomes_the_tool_is_one_process(story: Story) -> None:
    """kube-proxy's image has a script in front of iptables that chooses the back end."""
    pid = story.start("iptables-restore -w 5 --noflush --counters", 0)
    story.start("iptables-legacy-restore -w 5 --noflush --counters", 3, pid=pid)
    story.commit(story.rewrite(pid, 10, 11, plane=DataPlane.IPTABLES_LEGACY, table="nat"))
    story.end(pid, 12)
    (sync,) = story.tick(2000)
    assert times(sync) == (0, 12)
    assert sync.processes == 1
    assert sync.complete


def test_a_missing_exit_does_not_keep_a_run_for_ever(story: Story) -> None:
    """Its process is gone: what is known of it is what there was, and it is counted."""
    story.nft_list(0, 100)
    pid = story.start("nft -f -", 110)
    story.commit(story.rewrite(pid, 120, 121))
    story.alive.discard(pid)
    story.tick(1000)
    (sync,) = story.tick(2000)
    assert summary(sync) == (*NFTABLES, "committed")
    assert (times(sync), sync.complete) == ((0, 121), False)
    assert story.reducer.losses["exit_missed"] == 1


def test_a_missing_exit_of_a_list_does_not_keep_a_run_whose_write_ended(story: Story) -> None:
    """Not even where somebody else has its process id by now."""
    story.start("nft --json --terse list table ip kube-proxy", 0)
    story.nft_write(110, (112, 113), 125)
    assert story.running(130) == {}
    (sync,) = story.tick(1000)
    assert (summary(sync), sync.complete) == ((*NFTABLES, "committed"), False)


def test_what_is_told_twice_counts_once(story: Story) -> None:
    """Duplicated records change nothing, even after the run."""
    partial(story, 0)
    told = list(story.told)
    story.tell(*told)
    story.tick(1000)
    story.tell(*(event for event in told if type(event).__name__ == "Wrote"))
    assert len(story.tick(60_000)) == 1


def test_the_beginning_of_a_commits_run_is_known_at_its_commit(story: Story) -> None:
    """So that a change in the API can be compared with it; and of a stranger's it is not."""
    story.nft_list(5, 100)
    pid = story.start("nft -f -", 110)
    rewrite = story.commit(story.rewrite(pid, 120, 121))
    assert story.reducer.began_ns(rewrite) == 5_000_000
    assert story.reducer.began_ns(story.rewrite(pid, 1, 2)) is None
