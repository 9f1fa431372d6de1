# SPDX-License-Identifier: Apache-2.0
"""Whatever is told, in whatever order, lost or twice: no sample is made up, and nothing is pending for ever."""

from dataclasses import dataclass
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from kptrace.dataplanes.told import EVERYTHING
from kptrace.model.rewrite import Outcome
from kptrace.signals.programming_correlate import LOOK_BACK_NS, PATIENCE_NS
from kptrace.signals.programming_events import Attribution, Change, ChangeKind, Commit, Fate
from tests.unit.signals.programming_story import (
    ADDED,
    API,
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

IPS = ("10.0.0.1", "10.0.0.2", "10.0.0.3")
moments = st.integers(0, 12_000)
ports = st.sampled_from([WEB, API])
families = st.sampled_from([V4, V4, V6])


@st.composite
def any_change(draw: st.DrawFn) -> Change:
    """Any change of a small node."""
    kind = draw(st.sampled_from([*ChangeKind, ADDED, REMOVED]))
    addresses = () if kind.of_endpoint else (("10.96.0.1", 80),)
    return change(
        draw(moments),
        kind,
        draw(st.sampled_from(IPS)),
        draw(ports),
        family=draw(families),
        bare=draw(st.booleans()),
        addresses=addresses,
    )


@st.composite
def any_commit(draw: st.DrawFn) -> Commit:
    """Any transaction, of a run that took at most 3 s."""
    end = draw(moments)
    ends = draw(st.sets(st.sampled_from(IPS)))
    told = draw(
        st.sampled_from(
            [
                EVERYTHING,
                names(draw(ports)),
                holds(draw(ports), *ends),
                holds(draw(ports), *ends, full=True),
                holds(draw(ports), *ends, truncated=True),
            ]
        )
    )
    outcomes = [Outcome.COMMITTED] * 4 + list(Outcome)
    writers = ["kube-proxy", "kube-proxy", "kube-proxy", "other"]
    return commit(
        end - draw(st.sampled_from([0, 5, 200, 3000])),
        end,
        told,
        outcome=draw(st.sampled_from(outcomes)),
        writer=draw(st.sampled_from(writers)),
        family=draw(families),
    )


@dataclass(frozen=True)
class Other:
    """Something else that the correlator is told: a tick, a list, a loss."""

    what: str
    at: int
    changes: tuple[Change, ...] = ()


others = st.one_of(
    st.builds(Other, st.sampled_from(["tick", "tick", "busy", "lost", "reset"]), moments),
    st.builds(Other, st.just("list"), moments, st.lists(any_change(), max_size=3).map(tuple)),
)
tellings = st.lists(st.one_of(any_change(), any_change(), any_commit(), any_commit(), others), max_size=60)


def tell(watch: Watch, told: Change | Commit | Other) -> None:
    """Tell one of these."""
    if not isinstance(told, Other):
        watch.tell(told)
    elif told.what == "list":
        watch.changes += watch.correlator.relisted(told.changes)
    elif told.what in ("tick", "busy"):
        watch.tick(told.at, told.at - 100 if told.what == "busy" else None)
    else:
        getattr(watch.correlator, told.what)()


def check(watch: Watch, commits: list[Commit], changes: list[Change]) -> None:
    """What holds of all results."""
    assert watch.balanced()
    assert sum(ages.count for ages in watch.correlator.ages().values()) == len(watch.correlator)
    for result in watch.results:
        assert result.change in changes
        carried = result.fate in (Fate.PROGRAMMED, Fate.EARLY)
        assert (result.commit is not None) is carried is (result.attribution is not None)
        assert (result.reason is not None) is (result.fate is Fate.UNMEASURED)
        if result.commit is None:
            continue
        told = result.commit.told
        assert result.commit in commits
        assert result.commit.writer == "kube-proxy"
        assert result.commit.outcome in (Outcome.COMMITTED, Outcome.EMPTY)
        assert result.commit.family is result.change.family
        assert (result.duration_ns < 0) is (result.fate is Fate.EARLY)
        assert result.duration_ns >= -LOOK_BACK_NS
        if result.change.kind.of_endpoint:
            shown = told.endpoint(result.change.port, result.change.ip, result.change.number)
            assert shown in (None, result.change.kind.added)
        if result.attribution is Attribution.EXACT:
            assert told.touches(result.change.port, bare=False) is not False


@settings(deadline=None, max_examples=150)
@given(tellings, st.sampled_from([2, 1000]))
def test_every_change_has_one_fate_and_no_sample_is_made_up(
    told: list[Change | Commit | Other], limit: int
) -> None:
    """Samples, early, superseded, unmeasured and pending ones are the changes, at every moment."""
    watch = Watch(limit=limit)
    for each in told:
        tell(watch, each)
        assert len(watch.correlator) <= limit
        assert watch.balanced()
    changes = [each for each in told if isinstance(each, Change)]
    changes += [each for other in told if isinstance(other, Other) for each in other.changes]
    check(watch, [each for each in told if isinstance(each, Commit)], changes)


@settings(deadline=None, max_examples=100)
@given(tellings)
def test_nothing_is_pending_for_ever(told: list[Change | Commit | Other]) -> None:
    """Runs that succeed long after settle everything, whatever they show; runs that succeed soon after what they show."""
    watch = Watch()
    for each in told:
        tell(watch, each)
    late = 12_000 + PATIENCE_NS // MS
    for family in (V4, V6):
        for port in (WEB, API):
            watch.tell(commit(late, late + 50, holds(port), family=family))
    assert len(watch.correlator) == 0
    assert watch.balanced()


@settings(deadline=None, max_examples=100)
@given(tellings)
def test_a_legacy_run_after_them_settles_all_changes(told: list[Change | Commit | Other]) -> None:
    """Its table is whole."""
    watch = Watch()
    for each in told:
        tell(watch, each)
    watch.tell(commit(12_001, 12_050), commit(12_001, 12_050, family=V6))
    assert len(watch.correlator) == 0


@dataclass(frozen=True)
class Truth:
    """A node where one Service changes: what is told, and which commit first had each state."""

    changes: tuple[Change, ...]
    commits: tuple[Commit, ...]
    carrier: dict[Change, Commit]


@st.composite
def truths(draw: st.DrawFn) -> Truth:
    """kube-proxy hears of each endpoint's coming up to 300 ms sooner or later than we do, runs, rests for a second."""
    gaps = draw(st.lists(st.integers(1, 1500), min_size=1, max_size=12))
    times = [1000 + sum(gaps[: n + 1]) for n in range(len(gaps))]
    lags = st.lists(st.integers(0, 300), min_size=len(times), max_size=len(times))
    # Each watch is told in the order of the events.
    ours, theirs = (
        [max(t + lag for t, lag in zip(times[: n + 1], draw_lags, strict=False)) for n in range(len(times))]
        for draw_lags in (draw(lags), draw(lags))
    )
    changes = [change(ours[n], ip=f"10.0.1.{n}") for n in range(len(times))]
    commits: list[Commit] = []
    carrier: dict[Change, Commit] = {}
    free, done = 0, 0
    while done < len(times):
        begin = max(free, theirs[done])
        heard = sum(1 for each in theirs if each <= begin)
        end = begin + draw(st.integers(5, 900))
        free = end + 1000
        made = commit(begin, end, holds(WEB, *(f"10.0.1.{n}" for n in range(heard))))
        if draw(st.integers(0, 9)) == 0 and len(commits) < 20:
            commits.append(commit(begin, end, outcome=Outcome.FAILED))
            continue
        commits.append(made)
        carrier.update(dict.fromkeys(changes[done:heard], made))
        done = heard
    return Truth(tuple(changes), tuple(commits), carrier)


@settings(deadline=None, max_examples=150)
@given(truths(), st.data())
def test_each_change_is_given_to_the_commit_that_really_carried_it(truth: Truth, data: st.DataObject) -> None:
    """Commits are told in their order, changes in any order before, between and after them, all of it also twice."""
    told: list[Change | Commit] = list(truth.commits)
    for each in truth.changes * 2:
        told.insert(data.draw(st.integers(0, len(told))), each)
    for each in truth.commits:
        told.insert(data.draw(st.integers(told.index(each) + 1, len(told))), each)
    watch = Watch()
    watch.tell(*told)
    assert len(watch.correlator) == 0
    assert watch.changes == len(truth.changes)
    assert {result.change: result.commit for result in watch.results} == truth.carrier


@settings(deadline=None, max_examples=100)
@given(truths(), st.randoms(use_true_random=False))
def test_in_any_order_a_commit_is_given_that_has_the_change(truth: Truth, rng: Random) -> None:
    """A later one where that was told first: it is as true that the endpoint is there by then."""
    told: list[Change | Commit] = [*truth.changes, *truth.commits] * 2
    rng.shuffle(told)
    watch = Watch()
    watch.tell(*told)
    assert len(watch.correlator) == 0
    assert watch.changes == len(truth.changes) == len(watch.results)
    for result in watch.results:
        assert result.commit is not None
        assert result.commit.end_ns >= truth.carrier[result.change].end_ns


@settings(deadline=None, max_examples=150)
@given(truths())
def test_in_the_order_of_their_times_every_figure_is_right(truth: Truth) -> None:
    """As the daemon tells them: a change when it arrives, a commit when it ends."""

    def at(each: Change | Commit) -> int:
        return each.received_ns if isinstance(each, Change) else each.end_ns

    watch = Watch()
    watch.tell(*sorted([*truth.changes, *truth.commits], key=at))
    assert {result.change: result.commit for result in watch.results} == truth.carrier


@settings(deadline=None, max_examples=100)
@given(truths(), st.data())
def test_what_is_lost_makes_no_sample(truth: Truth, data: st.DataObject) -> None:
    """Without some of the events and commits, those that are left are given to a commit that has them, or to none."""
    every: list[Change | Commit] = [*truth.changes, *truth.commits]
    kept = data.draw(st.lists(st.sampled_from(every), unique_by=id))
    watch = Watch()
    watch.tell(*kept)
    for result in watch.results:
        if result.commit is not None:
            assert result.commit.end_ns >= truth.carrier[result.change].end_ns
            assert result.commit.told.endpoint(WEB, result.change.ip, 80)
    late = PATIENCE_NS // MS + 60_000
    watch.tell(commit(late, late + 10, holds(API)))
    assert len(watch.correlator) == 0
    assert watch.balanced()
