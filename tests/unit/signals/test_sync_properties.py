# SPDX-License-Identifier: Apache-2.0
"""Whatever is told, in whatever order, lost or twice: syncs make sense and nothing grows."""

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from kptrace.model.netfilter import DataPlane
from kptrace.model.rewrite import Outcome, Rewrite
from kptrace.signals import sync_run, sync_runs, sync_steps
from kptrace.signals.sync_events import Ended, Event, Phase, Span, Started, Sync, Wrote
from kptrace.signals.sync_reduce import SyncReducer
from tests.unit.signals.sync_story import MS, Story

COMMANDS = (
    "nft -f -",
    "nft --check -f -",
    "nft --json --terse list table ip kube-proxy",
    "nft --json --terse list table ip6 kube-proxy",
    "nft list ruleset",
    "iptables -w 5 -N KUBE-SERVICES",
    "iptables -w 5 -C X",
    "iptables -S KUBE-PROXY-CANARY",
    "iptables-save -t nat",
    "ip6tables-save",
    "iptables-restore --noflush",
    "ip6tables-restore -T nat",
    "conntrack -D",
    "bash",
)
OWNERS = ((1, "kube-proxy"), (2, "kube-proxy"), (3, "calico-node"), (4, "other"))
moments = st.integers(0, 4000).map(lambda ms: ms * MS)
lengths = st.sampled_from([0, 1, 5 * MS, 300 * MS, 40_000 * MS])
pids = st.integers(1, 12)


@st.composite
def events(draw: st.DrawFn) -> Event:
    """Any event of a small node."""
    at, pid = draw(moments), draw(pids)
    owner, writer = draw(st.sampled_from(OWNERS))
    match draw(st.sampled_from(["start", "start", "end", "end", "wrote", "wrote", "span"])):
        case "start":
            words = draw(st.sampled_from(COMMANDS)).split()
            argv = tuple(words) if draw(st.booleans()) else None
            return Started(pid, at, owner, writer, f"/usr/sbin/{words[0]}", words[0][:15], argv)
        case "end":
            return Ended(pid, at, draw(st.sampled_from([None, 0, 9, 256])))
        case "wrote":
            return Wrote(draw(rewrites(pid, at, writer)), draw(st.sampled_from([pid, owner])))
    phase = draw(st.sampled_from([Phase.LIST, Phase.LOCK_WAIT, Phase.CONNTRACK]))
    family = draw(st.sampled_from(["", "ipv4", "ipv6"]))
    return Span(pid, owner, writer, phase, at, at + draw(lengths), family)


@st.composite
def rewrites(draw: st.DrawFn, pid: int, at: int, writer: str) -> Rewrite:
    """Any transaction."""
    rewrite = Story().rewrite(
        pid,
        at / MS,
        at / MS,
        draw(st.sampled_from(["ipv4", "ipv6", "inet", "~none", "~several"])),
        draw(st.sampled_from(list(DataPlane))),
        draw(st.sampled_from(list(Outcome))),
        writer=draw(st.sampled_from([writer, writer, "flannel"])),
    )
    object.__setattr__(rewrite, "end_ns", at + draw(lengths))
    return rewrite


@dataclass
class Watch:
    """A reducer, and what must be so of what comes out.

    Attributes:
        reused: whether every second process id is somebody else's after its process's end.
        syncs: what came out.
    """

    reused: bool = True
    syncs: list[Sync] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Nothing happened yet."""
        self.reducer = SyncReducer(self.syncs.append, lambda tgid: self.reused and tgid % 2 == 0)

    def check(self) -> None:
        """Every sync makes sense, and the state is bounded."""
        seen: set[int] = set()
        for sync in self.syncs:
            assert sum(sync.phases.values()) == sync.duration_ns >= 0
            assert all(took > 0 for took in sync.phases.values())
            assert sync.outcome in (Outcome.COMMITTED, Outcome.FAILED, Outcome.EMPTY, Outcome.UNKNOWN)
            for commit in sync.commits:
                assert id(commit) not in seen, "a transaction in two syncs"
                seen.add(id(commit))
                assert sync.begin_ns <= commit.begin_ns
                assert commit.end_ns <= sync.end_ns
        assert len(self.reducer) <= sync_steps.MAX_PROCESSES * 3 + sync_runs.MAX_RUNS


@settings(deadline=None)
@given(st.lists(st.lists(events(), max_size=8), max_size=12), st.lists(moments, max_size=12))
def test_no_sequence_of_events_makes_nonsense(batches: list[list[Event]], ticks: list[int]) -> None:
    """Any interleaving; at the end, when all is quiet, nothing is left under way but what lives."""
    watch = Watch()
    for n, batch in enumerate(batches):
        watch.reducer.apply(batch)
        watch.reducer.running()
        if n < len(ticks):
            watch.reducer.tick(ticks[n])
        watch.check()
    for pid in range(1, 13):
        watch.reducer.apply([Ended(pid, 100_000 * MS, 0)])
    for now in (200_000, 300_000, 400_000):
        watch.reducer.tick(now * MS)
    watch.check()
    assert len(watch.reducer) == 0
    assert watch.reducer.running() == {}


def node() -> list[Event]:
    """Three writers' syncs in several seconds, as they really are."""
    story = Story()
    story.nft_list(0, 100)
    story.nft_list(10, 90, "ip6")
    story.nft_write(110, (112, 113), 125)
    story.nft_write(115, (118, 119), 130, "ipv6")
    story.owner, story.writer = 3, "calico-node"
    story.commit(story.rewrite(3, 50, 60, "inet", table="calico"))
    story.run("iptables-save -t filter", 200, 220)
    story.restore(230, [(232, 240)], 250)
    story.owner, story.writer = 100, "kube-proxy"
    story.nft_write(2000, (2001, 2002), 2015)
    story.nft_list(2016, 2100)
    story.nft_write(2110, None, 2120, status=256)
    return story.told


@settings(deadline=None)
@given(st.lists(st.integers(0, 30), max_size=4), st.lists(st.integers(0, 30), max_size=4))
def test_lost_and_duplicated_events_of_a_real_node(lost: list[int], twice: list[int]) -> None:
    """What is told twice changes nothing, what is lost costs time at most in the syncs that it was of."""
    whole = node()
    told = [event for n, event in enumerate(whole) if n not in lost]
    told += [event for n, event in enumerate(whole) if n in twice and n not in lost]
    watch = Watch(reused=False)
    watch.reducer.apply(told)
    for now in (5_000, 60_000, 120_000):
        watch.reducer.tick(now * MS)
    watch.check()
    commits = [commit for sync in watch.syncs for commit in sync.commits]
    assert len(commits) == sum(isinstance(event, Wrote) for event in whole) - len(
        {n for n in lost if n < len(whole) and isinstance(whole[n], Wrote)}
    )
    if not set(lost) & set(range(len(whole))):
        assert sorted((sync.writer, sync.family, sync.outcome.value) for sync in watch.syncs) == [
            ("calico-node", "inet", "committed"),
            ("calico-node", "ipv4", "committed"),
            ("kube-proxy", "ipv4", "committed"),
            ("kube-proxy", "ipv4", "failed"),
            ("kube-proxy", "ipv6", "committed"),
        ]


@settings(deadline=None)
@given(st.lists(events(), max_size=60))
def test_tiny_bounds_hold_too(told: list[Event]) -> None:
    """With two runs, three processes and four steps a run the same must be so."""
    before = sync_run.MAX_STEPS, sync_runs.MAX_RUNS, sync_steps.MAX_PROCESSES
    try:
        sync_runs.MAX_STEPS = sync_run.MAX_STEPS = 4  # type: ignore[misc]
        sync_runs.MAX_RUNS, sync_steps.MAX_PROCESSES = 2, 3  # type: ignore[misc]
        watch = Watch()
        for event in told:
            watch.reducer.apply([event])
            assert len(watch.reducer) <= 3 * 3 + 2
        watch.reducer.tick(10**15)
        for sync in watch.syncs:
            assert sync.processes + len(sync.commits) <= 4 * 100
            assert sum(sync.phases.values()) == sync.duration_ns
    finally:
        sync_run.MAX_STEPS, sync_runs.MAX_RUNS, sync_steps.MAX_PROCESSES = before  # type: ignore[misc]
        sync_runs.MAX_STEPS = before[0]  # type: ignore[attr-defined]
