# SPDX-License-Identifier: Apache-2.0
"""Runs of writers without a grammar: the life of a process, or a burst of rewrites."""

from kptrace.model.netfilter import DataPlane
from kptrace.model.rewrite import Outcome
from kptrace.signals import sync_run, sync_runs, sync_step, sync_steps
from kptrace.signals.sync_events import Phase
from kptrace.signals.sync_reduce import REASONS
from tests.unit.signals.sync_story import FAILED, KILLED, Story, phases, summary, times

SHELL, AGENT = 50, 60


def test_a_command_in_a_shell_is_a_run() -> None:
    """From the exec to the exit."""
    story = Story(SHELL, "other")
    pid = story.start("nft add rule inet mine input accept", 0)
    assert story.running(3) == {"other": 3}
    story.commit(story.rewrite(pid, 5, 6, "inet", table="mine"))
    story.end(pid, 20)
    (sync,) = story.tick(1000)
    assert summary(sync) == ("nftables", "inet", "other", "committed")
    assert phases(sync) == {"write": 5, "commit": 1, "teardown": 14}


def test_a_script_of_commands_is_one_run() -> None:
    """They follow one another with little between; another one follows after a while."""
    story = Story(SHELL, "other")
    for at in (0, 10, 20, 1000):
        pid = story.start("iptables -A INPUT -j ACCEPT", at)
        story.commit(story.rewrite(pid, at + 2, at + 3, plane=DataPlane.IPTABLES_LEGACY, table="filter"))
        story.end(pid, at + 5)
    first, second = story.tick(9000)
    assert (times(first), len(first.commits), first.processes) == ((0, 25), 3, 3)
    assert times(second) == (1000, 1005)
    assert phases(first) == {"write": 6, "commit": 3, "teardown": 6, "compute": 10}


def test_reading_is_no_run() -> None:
    """However long it takes, and whether or not it fails; it does not show as under way."""
    story = Story(SHELL, "other")
    story.run("nft list ruleset", 0, 2000)
    story.run("nft list table ip nothing", 3000, 3001, FAILED)
    story.run("iptables-save", 4000, 4100)
    story.run("iptables -C INPUT -j ACCEPT", 4200, 4201, FAILED)
    story.start("iptables-save", 5000)
    assert story.running(9000) == {}
    assert story.tick(100_000) == []


def test_trying_is_no_run() -> None:
    """By the command line, or by the transaction that has no end."""
    story = Story(SHELL, "other")
    for argv in (True, False):
        pid = story.start("nft --check -f /etc/nftables.conf", 0 if argv else 100, argv=argv)
        at = 1 if argv else 101
        story.commit(story.rewrite(pid, at, at + 1, outcome=Outcome.CHECKED))
        story.end(pid, at + 5)
    story.run("iptables-restore --test", 200, 210)
    assert story.tick(100_000) == []


def test_what_is_read_before_writing_is_part_of_the_run() -> None:
    """Calico in iptables mode saves, computes and restores."""
    story = Story(AGENT, "calico-node")
    story.run("iptables-nft-save -t filter", 0, 30)
    story.restore(50, [(52, 60)], 70, plane=DataPlane.IPTABLES_NFT)
    (sync,) = story.tick(1000)
    assert summary(sync) == ("iptables-nft", "ipv4", "calico-node", "committed")
    assert phases(sync) == {"list": 30, "compute": 20, "write": 2, "commit": 8, "teardown": 10}


def test_a_failing_command_is_a_failed_run() -> None:
    """Nothing told its family."""
    story = Story(SHELL, "other")
    story.run("nft -f /etc/broken.conf", 0, 10, FAILED)
    (sync,) = story.tick(1000)
    assert summary(sync) == ("nftables", "~none", "other", "failed")


def test_a_change_that_cannot_be_made_is_no_run() -> None:
    """Docker deletes rules that may not be there; nothing was handed to the kernel."""
    story = Story(AGENT, "docker")
    story.run("iptables -D FORWARD -j X", 0, 5, FAILED)
    assert story.tick(9000) == []


def test_a_daemons_burst_is_a_run_from_its_first_transaction_to_its_last() -> None:
    """What it does in between counts as computing; how long it lived before does not."""
    story = Story(AGENT, "calico-node")
    for begin, end in ((1000, 1010), (1100, 1105), (1400, 1410), (9000, 9001)):
        story.commit(story.rewrite(AGENT, begin, end, exec_at=1))
    story.tick(9100)
    first, second = story.tick(99_000)
    assert times(first) == (1000, 1410)
    assert phases(first) == {"commit": 25, "compute": 385}
    assert times(second) == (9000, 9001)
    assert first.processes == 0


def test_a_program_that_writes_and_ends_is_one_run() -> None:
    """A pyroute2 script: its life is the run, from exec to exit."""
    story = Story(AGENT, "other")
    story.commit(story.rewrite(AGENT, 300, 310, exec_at=100))
    story.end(AGENT, 330)
    (sync,) = story.tick(1000)
    assert times(sync) == (100, 330)
    assert phases(sync) == {"compute": 200, "commit": 10, "teardown": 20}


def test_a_daemon_that_ends_is_not_one_run() -> None:
    """It wrote before, or began too long ago, or did something else before it ended."""
    for writes, end in (((300, 5000), 5010), ((100_000,), 100_020), ((300,), 5000)):
        story = Story(AGENT, "other")
        for at in writes:
            story.tick(at - 1)
            story.commit(story.rewrite(AGENT, at, at + 10, exec_at=100))
        story.tick(end - 1)
        story.end(AGENT, end)
        story.tick(end + 10_000)
        assert times(story.syncs[-1]) == (writes[-1], writes[-1] + 10)
        assert phases(story.syncs[-1]) == {"commit": 10}


def test_two_writers_at_once_have_a_run_each() -> None:
    """Also in the same data plane and family."""
    story = Story()
    story.nft_list(0, 100)
    story.owner, story.writer = AGENT, "firewalld"
    story.commit(story.rewrite(AGENT, 50, 60))
    story.owner, story.writer = 100, "kube-proxy"
    story.nft_write(110, (112, 113), 120)
    found = {sync.writer: times(sync) for sync in story.tick(2000)}
    assert found == {"kube-proxy": (0, 120), "firewalld": (50, 60)}


def test_several_writers_in_one_program_are_told_apart_by_what_they_wrote() -> None:
    """In k3s flannel's iptables look like kube-proxy's until the chains tell."""
    story = Story()
    story.run("iptables-save -t nat", 0, 50)
    flannel = story.start("iptables -w 5 -N FLANNEL-POSTRTG", 60)
    legacy = DataPlane.IPTABLES_LEGACY
    story.commit(story.rewrite(flannel, 62, 63, plane=legacy, table="nat", writer="flannel"))
    story.end(flannel, 65)
    story.restore(70, [(72, 73), (74, 75)], 80)
    found = {sync.writer: (times(sync), len(sync.commits)) for sync in story.tick(2000)}
    assert found == {"kube-proxy": ((0, 80), 2), "flannel": ((60, 65), 1)}


def test_a_process_whose_exec_nobody_saw_has_an_incomplete_run() -> None:
    """An nft that was there before kptrace."""
    story = Story(AGENT, "other")
    story.alive.add(7)
    story.commit(story.rewrite(7, 10, 20))
    (sync,) = story.tick(1000)
    assert (times(sync), sync.complete) == ((10, 20), False)


def test_dumps_of_a_reader_are_no_run() -> None:
    """An exporter, or kptrace itself."""
    story = Story(AGENT, "other")
    story.span(AGENT, Phase.LIST, 0, 500, "ipv4")
    assert story.running(600) == {}
    assert story.tick(60_000) == []


def test_a_writer_that_dumps_and_writes_itself_computes_between() -> None:
    """Only pieces of one dump are one; between its dumps another writer than kube-proxy may do anything."""
    story = Story(AGENT, "calico-node")
    story.span(AGENT, Phase.LIST, 0, 10, "ipv4")
    story.span(AGENT, Phase.LIST, 10, 20, "ipv4")
    story.span(AGENT, Phase.LIST, 30, 40, "ipv4")
    story.commit(story.rewrite(AGENT, 50, 60))
    (sync,) = story.tick(2000)
    assert phases(sync) == {"list": 30, "compute": 20, "commit": 10}


def test_a_writer_that_never_rests_has_runs_of_bounded_length() -> None:
    """Each transaction is in one of them, and the cuts are counted."""
    story = Story(AGENT, "other")
    for n in range(sync_run.MAX_STEPS * 2 + 10):
        story.commit(story.rewrite(AGENT, n * 10, n * 10 + 1))
    syncs = story.tick(99_999)
    assert [len(sync.commits) for sync in syncs] == [sync_run.MAX_STEPS, sync_run.MAX_STEPS, 10]
    assert story.reducer.losses["run_split"] == 2


def test_a_process_with_very_many_transactions_is_bounded() -> None:
    """Those beyond are forgotten, which is counted and said."""
    story = Story(SHELL, "other")
    pid = story.start("nft -f big", 0)
    for n in range(sync_step.MAX_PARTS + 5):
        story.commit(story.rewrite(pid, n * 10, n * 10 + 1))
    story.end(pid, 99_000)
    (sync,) = story.tick(100_000)
    assert len(sync.commits) == sync_step.MAX_PARTS
    assert not sync.complete
    assert story.reducer.losses["parts_forgotten"] == 5


def test_a_flood_of_writers_forgets_the_oldest_runs() -> None:
    """Bounded, and counted."""
    story = Story()
    for n in range(sync_runs.MAX_RUNS + 3):
        story.owner, story.writer = 1000 + n, "other"
        story.commit(story.rewrite(1000 + n, n, n + 1))
    assert story.reducer.losses["run_forgotten"] == 3
    assert len(story.tick(9000)) == sync_runs.MAX_RUNS


def test_a_flood_of_processes_forgets_the_oldest() -> None:
    """Those that ended go first, uncounted."""
    story = Story(SHELL, "other")
    for n in range(sync_steps.MAX_PROCESSES):
        story.run("nft list ruleset", n, n + 0.5)
    assert story.reducer.losses["process_forgotten"] == 0
    for n in range(sync_steps.MAX_PROCESSES + 7):
        story.start("nft -f x", 10_000 + n)
    assert story.reducer.losses["process_forgotten"] == 7


def test_all_reasons_of_losses_are_there_from_the_start() -> None:
    """A metric that first appears with its first loss has no rate."""
    assert Story().reducer.losses == dict.fromkeys(REASONS, 0)


def test_an_exit_by_a_signal_fails_a_burst_too() -> None:
    """Killed before it handed anything over."""
    story = Story(SHELL, "other")
    story.run("ip6tables-restore", 0, 10, KILLED)
    (sync,) = story.tick(1000)
    assert summary(sync) == ("other", "ipv6", "other", "failed")
