# SPDX-License-Identifier: Apache-2.0
"""Which programs are measured: bounded, by priority and in turn, and through any sequence of replacements."""

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from kptrace.dataplanes.cilium.detect import FoundProgram
from kptrace.dataplanes.cilium.programs import KINDS, kind_of
from kptrace.kernel.objects import ProgramInfo
from kptrace.signals.datapath_cells import FLOOR_GROUP
from kptrace.signals.datapath_targets import (
    FORSAKEN_SECONDS,
    ROTATED_PRIORITY,
    SUPERSEDED_SECONDS,
    Seen,
    Target,
    TargetPlanner,
    target_of,
)

ROTATE = 300.0


def host(number: int, chain: str = "from_netdev") -> Target:
    """A program of the node's own."""
    return Target(number, 3, 1, 2, chain, "tc_ingress", "", 1)


def pod(number: int, endpoint: int) -> Target:
    """A program of an endpoint."""
    return Target(number, 3, 1, 2, "from_container", "tc_ingress", "", ROTATED_PRIORITY, endpoint)


def planner(limit: int = 4, at_once: int = 1000) -> TargetPlanner:
    """One without a bound on what is attached at once, unless the test gives it one."""
    return TargetPlanner(limit, ROTATE, at_once)


def numbers(targets: tuple[Target, ...]) -> list[int]:
    """Their ids."""
    return [target.program_id for target in targets]


def test_there_are_fewer_kinds_of_programs_than_groups() -> None:
    """No group of programs can get the number that the floor is measured under."""
    assert len({(kind.hook, kind.chain) for kind in KINDS}) <= FLOOR_GROUP


def test_a_found_program_becomes_a_target_by_its_first_function() -> None:
    """What the kernel tells of a program and what its name says are put together."""
    kind = kind_of("cil_from_container")
    assert kind is not None
    info = ProgramInfo(7, 3, "cil_from_contai", "00", 5, (11, 12), (), 0, 0, 0, 0)
    assert target_of(FoundProgram(kind, info, 42)) == Target(
        7, 3, 5, 11, "from_container", "tc_ingress", "", kind.priority, 42
    )


def test_the_nodes_own_programs_come_before_endpoints() -> None:
    """Of more than there is room for, those of the node are measured, and the rest waits."""
    plan = planner(3).plan(Seen((pod(1, 1), pod(2, 2), pod(3, 3), host(4), host(5, "to_netdev"))), 0.0)
    assert numbers(plan.attach) == [4, 5, 1]
    assert numbers(plan.waiting) == [2, 3]


def test_nothing_changes_where_nothing_changed() -> None:
    """A second look at the same kernel asks for nothing."""
    own, seen = planner(), Seen((host(1), pod(2, 1)), frozenset({1, 2}))
    own.plan(seen, 0.0)
    assert own.plan(seen, 1.0) == own.plan(seen, 2.0)
    assert own.plan(seen, 3.0).attach == own.plan(seen, 3.0).release == ()


def test_a_replaced_program_is_let_go_when_its_link_has_another() -> None:
    """The new one is attached to as soon as it is there, the old one released as soon as no link has it."""
    own = planner()
    own.plan(Seen((host(1),), frozenset({1})), 0.0)
    loaded = own.plan(Seen((host(1), host(2)), frozenset({1})), 1.0)
    assert (numbers(loaded.attach), loaded.release) == ([2], ())
    switched = own.plan(Seen((host(1), host(2)), frozenset({2})), 2.0)
    assert (switched.attach, switched.release) == ((), (1,))
    # Our pair held it: it may stay in the list a moment longer, and is not attached to again.
    assert own.plan(Seen((host(1), host(2)), frozenset({2})), 3.0).attach == ()


def test_a_program_without_a_link_is_let_go_when_it_runs_no_more() -> None:
    """Superseded and idle, it is released once; if the kernel still has it then, others hold it: it is measured again."""
    own = planner()
    seen = Seen((host(1), host(2)), idle=frozenset({1}))
    own.plan(seen, 0.0)
    assert own.plan(seen, SUPERSEDED_SECONDS / 2).release == ()
    assert own.plan(seen, SUPERSEDED_SECONDS).release == (1,)
    assert numbers(own.plan(seen, 6.0).attach) == [1]
    assert own.plan(seen, 6.0 + SUPERSEDED_SECONDS).release == ()
    assert own.plan(seen, 6.0 + FORSAKEN_SECONDS).release == (1,)


def test_a_program_without_a_link_that_runs_is_kept() -> None:
    """A filter of tc that is in use is never let go, however many of its kind are there."""
    own = planner()
    seen = Seen((host(1), host(2)))
    own.plan(seen, 0.0)
    assert own.plan(seen, 10 * FORSAKEN_SECONDS).release == ()


def test_an_idle_program_that_a_link_has_is_kept() -> None:
    """Where links tell, nothing needs to be tried."""
    own = planner()
    seen = Seen((host(1), host(2)), frozenset({1, 2}), frozenset({1, 2}))
    own.plan(seen, 0.0)
    assert own.plan(seen, 10 * FORSAKEN_SECONDS).release == ()


def test_a_successor_goes_on_with_the_turn() -> None:
    """Where all turns are taken, an endpoint's new program is measured in its old one's place."""
    own = planner(2)
    linked = frozenset({1, 2, 3})
    own.plan(Seen((pod(1, 1), pod(2, 2), pod(3, 3)), linked), 0.0)
    plan = own.plan(Seen((pod(1, 1), pod(2, 2), pod(3, 3), pod(4, 1)), linked - {1} | {4}), 1.0)
    assert (numbers(plan.attach), plan.release) == ([4], (1,))
    # It took over what was left of the turn, not a new one.
    plan = own.plan(Seen((pod(2, 2), pod(3, 3), pod(4, 1)), frozenset({2, 3, 4})), ROTATE)
    assert numbers(plan.attach) == [3]


def test_what_the_kernel_refused_is_not_tried_again() -> None:
    """And it is told as refused as long as it is there."""
    own = planner()
    own.plan(Seen((host(1),)), 0.0)
    own.refuse(host(1))
    assert own.plan(Seen((host(1),)), 1.0).attach == ()
    assert own.refused == (host(1),)
    own.plan(Seen(()), 2.0)
    assert own.refused == ()


def test_a_plan_attaches_to_few_at_once() -> None:
    """The rest follows with the next plans, in the same order."""
    own, seen = planner(10, at_once=3), Seen(tuple(pod(n, n) for n in range(7)))
    plans = [own.plan(seen, 0.0) for _ in range(3)]
    assert [numbers(plan.attach) for plan in plans] == [[0, 1, 2], [3, 4, 5], [6]]
    assert [plan.more for plan in plans] == [True, True, False]
    assert [len(plan.waiting) for plan in plans] == [4, 1, 0]


@given(st.integers(1, 40), st.integers(1, 12))
def test_every_endpoint_has_its_turn(endpoints: int, room: int) -> None:
    """After as many turns as it takes, each was measured, however many there are."""
    own, seen = planner(room), Seen(tuple(pod(n, n) for n in range(endpoints)))
    measured: set[int] = set()
    for turn in range(-(-endpoints // room)):
        own.plan(seen, turn * ROTATE)
        measured |= set(numbers(own.measured))
    assert measured == set(range(endpoints))


@dataclass
class Kernel:
    """A kernel whose programs are freed once neither a hook nor our pair holds them."""

    links: bool
    attached: dict[int, Target] = field(default_factory=dict)
    held: dict[int, Target] = field(default_factory=dict)
    born: int = 0

    def put(self, place: int, chain: str) -> None:
        """Load a program and put it into a place, whatever was there."""
        self.born += 1
        endpoint = None if place < 2 else place
        priority = 1 if place < 2 else ROTATED_PRIORITY
        self.attached[place] = Target(self.born, 3, 1, 2, chain, "tc_ingress", "", priority, endpoint)

    def seen(self) -> Seen:
        """What a look sees: a program runs as long as it is in its place."""
        running = {target.program_id: target for target in self.attached.values()}
        present = {**running, **self.held}
        linked = frozenset(running) if self.links else frozenset()
        return Seen(tuple(present.values()), linked, frozenset(self.held.keys() - running.keys()))


@given(
    st.booleans(),
    st.integers(1, 6),
    st.lists(
        st.tuples(st.sampled_from(["put", "remove", "look"]), st.integers(0, 5), st.floats(0, 400)),
        max_size=60,
    ),
)
def test_any_sequence_of_replacements(links: bool, limit: int, steps: list[tuple[str, int, float]]) -> None:
    """Never more than the limit; what is in no place is let go; and in the end all that can be is measured."""
    kernel, own, now = Kernel(links), planner(limit), 0.0

    def look() -> None:
        seen = kernel.seen()
        present = {target.program_id for target in seen.targets}
        plan = own.plan(seen, now)
        for target in plan.attach:
            assert target.program_id in present
            assert target.program_id not in kernel.held
            kernel.held[target.program_id] = target
        for number in plan.release:
            del kernel.held[number]
        assert set(numbers(own.measured)) == set(kernel.held)
        assert len(kernel.held) <= limit

    for step, place, pause in steps:
        now += pause
        if step == "put":
            kernel.put(place, "from_netdev" if place < 2 else "from_container")
        elif step == "remove":
            kernel.attached.pop(place, None)
        else:
            look()
    for _ in range(4 + limit):
        now += FORSAKEN_SECONDS
        look()
    running = {target.program_id: target for target in kernel.attached.values()}
    assert kernel.held.keys() <= running.keys()
    assert len(kernel.held) == min(limit, len(running))
    first = [number for number, target in running.items() if target.priority < ROTATED_PRIORITY]
    assert len(first) > limit or set(first) <= kernel.held.keys()
