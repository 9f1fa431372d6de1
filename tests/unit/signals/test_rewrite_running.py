# SPDX-License-Identifier: Apache-2.0
"""Transactions under way: who has been writing for how long, while it lasts."""

from dataclasses import dataclass, field, replace

from hypothesis import given
from hypothesis import strategies as st

from kptrace.signals.rewrite_kernel import Running
from kptrace.signals.rewrite_running import RunningRewrites

HERE, ELSEWHERE = 10, 11
SECOND = 1_000_000_000


@dataclass
class Node:
    """The kernel's list, and who lives.

    Attributes:
        list_: what is under way; `Transactions` in a plain list.
        dead: processes that are gone.
        writers: class by process.
        asked: processes whose class was asked for.
    """

    list_: list[Running] = field(default_factory=list)
    dead: set[int] = field(default_factory=set)
    writers: dict[int, str] = field(default_factory=dict)
    asked: list[int] = field(default_factory=list)
    watch: RunningRewrites = field(init=False)

    def __post_init__(self) -> None:
        """Begin to watch."""
        self.watch = RunningRewrites(self, HERE, lambda tgid: tgid not in self.dead, self.writer)

    def running(self) -> list[Running]:
        """What is under way."""
        return list(self.list_)

    def forget(self, run: Running) -> None:
        """Remove one."""
        self.list_.remove(run)

    def writer(self, tgid: int) -> str:
        """The class of a process."""
        self.asked.append(tgid)
        return self.writers.get(tgid, "other")

    def ages(self, now_ns: int) -> dict[str, float]:
        """Seconds by class."""
        samples = self.watch.ages(now_ns)
        found = {sample.labels[0]: sample.value for sample in samples}
        assert len(found) == len(samples)
        return found


def run(tgid: int, begin_ns: int = 0, netns: int = HERE, *, tid: int = 0) -> Running:
    """A transaction under way."""
    return Running(tgid, tid or tgid, begin_ns, 1, netns)


def test_without_writers_there_is_nothing() -> None:
    """A label set appears with its first sample."""
    node = Node()
    node.watch.tick()
    assert node.ages(5) == {}
    assert not node.watch.busy()


def test_a_long_transaction_is_seen_while_it_lasts() -> None:
    """A quarter of an hour is a quarter of an hour before it ends, and 0 afterwards."""
    node = Node([run(7, 2 * SECOND)], writers={7: "kube-proxy"})
    node.watch.tick()
    assert node.ages(902 * SECOND) == {"kube-proxy": 900.0}
    node.list_.clear()
    assert node.ages(903 * SECOND) == {"kube-proxy": 0.0}
    node.watch.tick()
    assert node.ages(903 * SECOND) == {"kube-proxy": 0.0}


def test_a_finished_writer_is_idle() -> None:
    """A class of which a finished transaction told is shown as 0 from then on."""
    node = Node()
    node.watch.saw("flannel")
    node.watch.saw("flannel")
    assert node.ages(5) == {"flannel": 0.0}


def test_the_longest_of_a_class_counts() -> None:
    """Two of one class are one sample, of the one that began first."""
    node = Node(
        [run(7, 30 * SECOND), run(8, 10 * SECOND), run(8, 20 * SECOND, tid=9), run(5, 39 * SECOND)],
        writers={7: "kube-proxy", 8: "kube-proxy"},
    )
    node.watch.tick()
    assert node.ages(40 * SECOND) == {"kube-proxy": 30.0, "other": 1.0}


def test_other_namespaces_are_not_shown() -> None:
    """A pod's own long transaction neither shows nor keeps the watched namespace busy."""
    node = Node([run(7, 0, ELSEWHERE)])
    node.watch.tick()
    assert node.ages(SECOND) == {}
    assert not node.watch.busy()
    assert node.asked == []
    node.list_.append(run(8))
    assert node.watch.busy()


def test_the_youngest_have_no_class_yet() -> None:
    """Between two ticks nobody looks a process up: a scrape then leaves the new one out."""
    node = Node([run(7, 0)], writers={7: "kube-proxy", 8: "kubelet"})
    node.watch.tick()
    node.list_.append(run(8, 0))
    assert node.ages(SECOND) == {"kube-proxy": 1.0}
    assert node.asked == [7]
    node.watch.tick()
    assert node.ages(SECOND) == {"kube-proxy": 1.0, "kubelet": 1.0}


def test_a_transaction_is_classified_once() -> None:
    """Its class stays though its process's parents are gone by the next tick; the thread's next one is new."""
    node = Node([run(7, 5)], writers={7: "kube-proxy"})
    node.watch.tick()
    node.writers[7] = "other"
    node.watch.tick()
    assert node.asked == [7]
    assert node.ages(5 + SECOND) == {"kube-proxy": 1.0}
    node.list_[:] = [run(7, 6)]
    assert node.ages(5 + SECOND) == {"kube-proxy": 0.0}
    node.watch.tick()
    assert node.asked == [7, 7]


def test_those_of_dead_processes_are_forgotten() -> None:
    """A process that was killed where no exit was seen does not seem to write for ever, here or elsewhere."""
    node = Node([run(7), run(8, 0, ELSEWHERE), run(9)], dead={7, 8})
    node.watch.tick()
    assert node.list_ == [run(9)]
    assert node.asked == [9]


events = st.lists(
    st.one_of(
        st.builds(run, st.integers(1, 50), st.integers(0, 10), st.sampled_from([HERE, ELSEWHERE])),
        st.sampled_from(["tick", "end", "die"]),
    ),
    max_size=60,
)


@given(events)
def test_samples_are_bounded_by_the_classes(happened: list[Running | str]) -> None:
    """Whoever begins, ends and dies: a sample for each class seen at most, no negative age, and no name kept for nobody."""
    classes = ["kube-proxy", "kubelet", "other"]
    node = Node(writers={tgid: classes[tgid % 3] for tgid in range(100)})
    for event in happened:
        if isinstance(event, Running):
            node.list_.append(event)
            node.dead.discard(event.tgid)
        elif event == "tick":
            node.watch.tick()
            assert len(node.watch._named) <= len(node.list_)
        elif node.list_ and event == "end":
            node.list_.pop(0)
        elif node.list_:
            node.dead.add(node.list_[0].tgid)
        ages = node.ages(10)
        assert ages.keys() <= set(classes)
        assert all(0 <= age <= 10 / SECOND for age in ages.values())


def test_a_flood_of_transactions_leaves_nothing_behind() -> None:
    """Ten thousand threads' transactions are three samples, and when they are over no name is kept."""
    node = Node([run(n, n) for n in range(1, 10_001)])
    node.writers = {n: f"class{n % 3}" for n in range(10_001)}
    node.watch.tick()
    assert len(node.ages(20_000)) == 3
    node.list_ = [replace(each, netns=ELSEWHERE) for each in node.list_[:5]]
    node.watch.tick()
    assert len(node.watch._named) == 0
    assert node.ages(20_000) == {"class0": 0.0, "class1": 0.0, "class2": 0.0}
