# SPDX-License-Identifier: Apache-2.0
"""Which commit carried which change: stories with one figure each, times in ms."""

from dataclasses import replace

from kptrace.dataplanes.iptables.services import ChainsTold, endpoint_chains
from kptrace.dataplanes.nftables.services import ServiceBatch
from kptrace.model.rewrite import Outcome
from kptrace.signals.programming_events import ChangeKind
from tests.unit.signals.programming_story import (
    ADDED,
    API,
    CREATED,
    DELETED,
    MS,
    REMOVED,
    V4,
    V6,
    WEB,
    Watch,
    change,
    commit,
    holds,
    names,
)

A, B, C = "10.0.0.1", "10.0.0.2", "10.0.0.3"


def test_the_commit_whose_bytes_show_the_endpoint_carries_it() -> None:
    """Also where its run began before the event arrived here, and nothing else of the Service port."""
    watch = Watch()
    assert watch.tell(change(100, ip=A), change(105, ip=B)) == []
    assert watch.tell(commit(99, 140, holds(WEB, A, C))) == ["programmed 40 exact"]
    assert watch.tell(commit(1140, 1180, holds(API, B))) == []
    assert watch.tell(commit(2180, 2220, holds(WEB, A, B, C))) == ["programmed 2115 exact"]
    assert watch.balanced()


def test_a_removal_is_carried_by_the_commit_that_writes_without_it() -> None:
    """The batch writes the Service port anew; what is not in it is gone."""
    watch = Watch()
    watch.tell(change(100, REMOVED, A))
    assert watch.tell(commit(101, 120, holds(WEB, A, B))) == []
    assert watch.tell(commit(1121, 1130, holds(WEB, B))) == ["programmed 1030 exact"]


def test_scale_from_1_to_44_in_back_to_back_writes() -> None:
    """The first run has the first endpoint; the second one all others."""
    watch = Watch()
    ends = [f"10.0.1.{n}" for n in range(43)]
    for n, ip in enumerate(ends):
        watch.tell(change(100 + 3.5 * n, ip=ip))
    assert watch.tell(commit(100.4, 240, holds(WEB, A, ends[0]))) == ["programmed 140 exact"]
    assert len(watch.tell(commit(1241, 1383, holds(WEB, A, *ends)))) == 42
    assert len(watch.correlator) == 0
    assert watch.balanced()


def test_a_commit_that_beat_us_is_early() -> None:
    """By at most 5 s; in whatever order we were told."""
    watch = Watch()
    assert watch.tell(commit(90, 100, holds(WEB, A)), change(101)) == ["early -1 exact"]
    watch = Watch()
    assert watch.tell(change(101), commit(90, 100, holds(WEB, A))) == ["early -1 exact"]
    watch = Watch()
    assert watch.tell(commit(90, 100, holds(WEB, A)), change(5100)) == ["early -5000 exact"]
    watch = Watch()
    assert watch.tell(commit(90, 100, holds(WEB, A)), change(5101)) == []
    assert watch.tell(change(5101), commit(90, 100, holds(WEB, A))) == []


def test_of_commits_that_beat_us_the_newest_that_tells_is_right() -> None:
    """An endpoint that came and went before we heard of its coming is not there."""
    watch = Watch()
    watch.tell(commit(10, 20, holds(WEB, A)), commit(1020, 1030, holds(WEB)), commit(2030, 2040, holds(API)))
    assert watch.tell(change(2050, ADDED, A)) == []
    assert watch.tell(change(2060, REMOVED, A)) == ["superseded", "superseded"]
    assert watch.balanced()


def test_a_commit_told_before_its_change_is_found() -> None:
    """The ring buffer may be drained before the watch's queue."""
    watch = Watch()
    assert watch.tell(commit(101, 140, holds(WEB, A)), change(100)) == ["programmed 40 exact"]


def test_by_names_alone_the_runs_beginning_decides() -> None:
    """It touched the Service port, and its run began after the event: that is exact."""
    watch = Watch()
    watch.tell(change(100, ip=A), change(102, ip=B))
    assert watch.tell(commit(101, 140, names(API))) == []
    assert watch.tell(commit(101, 140, names(WEB))) == ["programmed 40 exact"]
    assert watch.tell(commit(1141, 1180, names(WEB))) == ["programmed 1078 exact"]


def test_a_legacy_table_carries_everything_that_its_run_could_know() -> None:
    """The first replace of the family whose run began after the event."""
    watch = Watch()
    watch.tell(change(100), change(100, port=API), change(100, family=V6), change(130, ip=B))
    assert watch.tell(commit(101, 160)) == ["programmed 60 inferred"] * 2
    assert watch.tell(commit(1161, 1200)) == ["programmed 1070 inferred"]
    assert watch.tell(commit(1161, 1200, family=V6)) == ["programmed 1100 inferred"]


def test_a_run_that_began_a_little_before_the_event_was_it_if_no_other_follows() -> None:
    """On a quiet node our watch is told about when kube-proxy's is."""
    watch = Watch()
    watch.tell(change(100))
    assert watch.tell(commit(99, 160)) == []
    assert watch.tick(5159) == []
    assert watch.tick(5160) == ["programmed 60 inferred"]


def test_it_was_early_if_it_was_over_by_then() -> None:
    """Also of a transaction that was told before the change."""
    for told in ((change(100), commit(60, 80)), (commit(60, 80), change(100))):
        watch = Watch()
        assert watch.tell(*told) == []
        assert watch.tick(5100) == ["early -20 inferred"]


def test_another_run_within_the_time_takes_it() -> None:
    """Which began after the event."""
    watch = Watch()
    watch.tell(change(100), commit(99, 160))
    assert watch.tell(commit(1160, 1200)) == ["programmed 1100 inferred"]
    assert watch.tick(9000) == []


def test_a_run_that_is_under_way_is_waited_for() -> None:
    """It may be the one, however long it takes; the run of the same commit is not another."""
    watch = Watch()
    watch.tell(change(100), commit(60, 80))
    assert watch.tick(8000, running=101) == []
    assert watch.tell(commit(101, 9000)) == ["programmed 8900 inferred"]
    watch = Watch()
    watch.tell(change(100), commit(99, 160))
    assert watch.tick(6000, running=99) == ["programmed 60 inferred"]


def test_what_a_failed_run_had_comes_with_the_next_that_succeeds() -> None:
    """35 s later, with or without a transaction of the failed run, in whatever order these are told."""
    failed = commit(101, 170, outcome=Outcome.FAILED)
    for told in ([change(100), commit(60, 80), failed], [failed, commit(60, 80), change(100)]):
        watch = Watch()
        watch.tell(*told)
        assert watch.tick(30_000) == []
        assert watch.correlator.ages()[V4].oldest_ns == 100 * MS
        assert watch.tell(commit(30_170, 35_100)) == ["programmed 35000 inferred"]


def test_a_failed_transaction_carries_nothing_whatever_it_shows() -> None:
    """Nor does a dry run."""
    watch = Watch()
    watch.tell(change(100))
    assert watch.tell(commit(101, 150, holds(WEB, A), outcome=Outcome.FAILED)) == []
    assert watch.tell(commit(101, 150, holds(WEB, A), outcome=Outcome.CHECKED)) == []
    assert watch.tell(commit(30_150, 40_100, holds(WEB, A, full=True))) == ["programmed 40000 exact"]


def test_a_transaction_with_nothing_to_do_finds_it_done() -> None:
    """What it shows is so."""
    watch = Watch()
    watch.tell(change(100))
    assert watch.tell(commit(101, 150, holds(WEB, A), outcome=Outcome.EMPTY)) == ["programmed 50 exact"]


def test_an_unknown_outcome_measures_nothing() -> None:
    """It may have carried the change: it is not pending for ever, and no figure is made up."""
    watch = Watch()
    watch.tell(change(100), change(160, ip=B))
    assert watch.tell(commit(101, 150, outcome=Outcome.UNKNOWN)) == ["unmeasured unknown_outcome"]
    assert watch.tick(90_000) == []
    assert len(watch.correlator) == 1


def test_a_cut_batch_carries_what_its_run_could_know() -> None:
    """What the copy shows is exact; all else is by time."""
    watch = Watch()
    watch.tell(change(100, ip=A), change(100, ip=B), change(120, ip=C), change(120, port=API))
    told = commit(101, 150, holds(WEB, A, truncated=True))
    assert watch.tell(told) == ["programmed 50 exact", "programmed 50 inferred"]
    assert watch.tick(5150) == ["programmed 30 inferred"] * 2


def test_a_full_sync_shows_that_endpoints_are_gone() -> None:
    """It has every chain that is in use."""
    watch = Watch()
    watch.tell(change(100, REMOVED, A), change(100, REMOVED, A, API))
    assert watch.tell(commit(99, 150, holds(WEB, A, full=True))) == ["programmed 50 exact"]


def test_nobody_elses_commits_count() -> None:
    """The writer's class is looked at; another one can be asked for."""
    watch = Watch()
    assert watch.tell(change(100), commit(101, 150, holds(WEB, A), writer="other")) == []
    watch = Watch(writers=("other",))
    assert watch.tell(change(100), commit(101, 150, holds(WEB, A), writer="other")) == ["programmed 50 exact"]


def test_what_is_undone_before_a_commit_is_superseded() -> None:
    """Both changes; the next one of the endpoint is measured again."""
    watch = Watch()
    assert watch.tell(change(100), change(110, REMOVED)) == ["superseded"] * 2
    assert watch.tell(change(120), commit(121, 150, holds(WEB, A))) == ["programmed 30 exact"]
    assert watch.balanced()


def test_what_went_with_its_service_is_superseded() -> None:
    """A Service port that goes is one change, with its endpoints."""
    watch = Watch()
    watch.tell(change(100, ip=A), change(100, REMOVED, B), change(100, port=API))
    gone = change(110, DELETED, addresses=(("10.96.0.1", 80),), bare=True)
    assert watch.tell(gone) == ["superseded"] * 2
    batch = ServiceBatch(V4, keys={("10.96.0.1", 80, WEB.protocol): False})
    assert watch.tell(commit(111, 150, batch)) == ["programmed 40 exact"]
    assert len(watch.correlator) == 1


def test_a_service_that_comes_is_there_with_its_address_or_its_chains() -> None:
    """The first sync may have the Service without its endpoints."""
    watch = Watch()
    came = change(100, CREATED, addresses=(("10.96.0.1", 80),), bare=True)
    watch.tell(came, change(104, ip=A))
    bare = ServiceBatch(
        V4, bare={("demo/web:http", WEB.protocol)}, keys={("10.96.0.1", 80, WEB.protocol): True}
    )
    assert watch.tell(commit(100.5, 120, bare)) == ["programmed 20 exact"]
    assert watch.tell(commit(1121, 1136, holds(WEB, A))) == ["programmed 1032 exact"]
    watch = Watch()
    watch.tell(came)
    assert watch.tell(commit(99, 120, holds(WEB, A))) == ["programmed 20 exact"]


def test_an_address_that_comes_alone() -> None:
    """A load balancer's address arrives long after its Service."""
    watch = Watch()
    balancer = replace(change(100, CREATED), ip="192.0.2.1", number=80)
    watch.tell(balancer, change(101, DELETED))
    assert watch.fates() == ["superseded"]
    watch.tell(replace(balancer, received_ns=200 * MS))
    batch = ServiceBatch(V4, keys={("192.0.2.1", 80, WEB.protocol): True})
    batch = replace(batch, bare={("demo/web:http", WEB.protocol)})
    assert "programmed 40 exact" in watch.tell(commit(199, 240, batch))


def test_iptables_nft_shows_endpoints_by_their_hashes() -> None:
    """And a Service port that lost its last one by time: it has no chain any more."""
    (web,) = endpoint_chains(WEB, A, 80)
    chains = frozenset({"KUBE-SERVICES", "KUBE-SVC-XRY76EGRC3BSCIIJ", web})
    watch = Watch()
    watch.tell(change(100, ip=A), change(100, ip=B), change(100, REMOVED, C), change(100, port=API))
    found = watch.tell(commit(99, 150, ChainsTold(V4, written=chains, whole=True)))
    assert found == ["programmed 50 exact"] * 2
    watch = Watch()
    watch.tell(change(100, REMOVED, A), change(102, REMOVED, B, bare=True), change(100, REMOVED, A, API))
    services = ChainsTold(V4, written=frozenset({"KUBE-SERVICES"}), whole=True)
    assert watch.tell(commit(103, 150, services)) == ["programmed 50 inferred", "programmed 48 inferred"]
    assert len(watch.correlator) == 1


def test_a_commit_that_shows_otherwise_clears_an_earlier_perhaps() -> None:
    """The run before cannot have carried what the next one lacks."""
    watch = Watch()
    watch.tell(change(100), commit(99, 150), commit(99, 160, holds(WEB, B)))
    assert watch.tick(60_000) == []
    assert len(watch.correlator) == 1


def test_only_the_newest_perhaps_is_kept() -> None:
    """Told in whatever order."""
    watch = Watch()
    watch.tell(change(200), commit(150, 190), commit(100, 120))
    assert watch.tick(5200) == ["early -10 inferred"]


def test_kinds_say_what_they_are() -> None:
    """Label values as in the metric dictionary."""
    assert [str(kind) for kind in ChangeKind] == [
        "endpoint_added",
        "endpoint_removed",
        "service_added",
        "service_removed",
    ]


def test_a_cut_batch_that_mentions_an_endpoint_carries_it_where_it_came() -> None:
    """kube-proxy writes the chain of an endpoint that goes too, to empty it: there time decides."""
    (chain,) = endpoint_chains(WEB, A, 80)
    cut = ChainsTold(V4, truncated=True, written=frozenset({chain}))
    watch = Watch()
    watch.tell(change(100, ADDED, A), change(100, ADDED, B))
    assert watch.tell(commit(99, 140, cut)) == ["programmed 40 exact"]
    assert watch.tell(commit(1140, 1180, cut)) == ["programmed 1080 inferred"]
    watch.tell(change(2000, REMOVED, A))
    assert watch.tell(commit(2010, 2020, cut)) == ["programmed 20 inferred"]
    assert watch.tell(change(3000, ADDED, A)) == []
    assert watch.tell(commit(3001, 3010, cut)) == ["programmed 10 exact"]
    assert watch.balanced()
