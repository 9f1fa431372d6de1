# SPDX-License-Identifier: Apache-2.0
"""Which of the datapath's entry programs are measured: a bounded number, by priority, the others in turn. Pure.

A pair of tracing programs holds its target in the kernel: a program that was replaced stays in the kernel's list for as long
as it is measured. So what tells that it was replaced is that the link which had it has another one; of programs that no link
has (filters of tc, links of old kernels) only letting go shows whether anybody else holds them.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from kptrace.dataplanes.cilium.detect import FoundProgram

#: Programs of this priority and beyond are measured in turn; those before it always come first.
ROTATED_PRIORITY: Final = 3
LIMIT: Final = 100
ROTATE_SECONDS: Final = 300.0
AT_ONCE: Final = 8
#: How long a program that no link has is measured before it is let go once, to see whether anybody else holds it, if it does
#: not run meanwhile: where a later one of its kind is there, and where none is.
SUPERSEDED_SECONDS: Final = 5.0
FORSAKEN_SECONDS: Final = 600.0


@dataclass(frozen=True, slots=True)
class Target:
    """An entry program that a pair of tracing programs can be attached to.

    Attributes:
        program_id: never used again.
        program_type: `enum bpf_prog_type`.
        btf_id: of its BTF object; 0 if it has none.
        function_id: type id of its first function in that BTF; 0 if that is not known.
        chain: its kind, as a label value.
        hook: where it is called, as a label value.
        family: of what it sees: ipv4, ipv6, or empty where both come.
        priority: 0 before all others; from `ROTATED_PRIORITY` on in turn.
        endpoint: id of the endpoint whose packets it sees; None where it is none's, or not known.
    """

    program_id: int
    program_type: int
    btf_id: int
    function_id: int
    chain: str
    hook: str
    family: str
    priority: int
    endpoint: int | None = None

    @property
    def place(self) -> tuple[str, str, int | None]:
        """What stays when the program is replaced, as far as is known: many devices' programs may be in one place."""
        return self.hook, self.chain, self.endpoint


@dataclass(frozen=True, slots=True)
class Seen:
    """What is in the kernel now.

    Attributes:
        targets: all, measured or not.
        linked: ids of programs that a BPF link has at a hook.
        idle: ids of measured ones that did not run lately.
    """

    targets: tuple[Target, ...]
    linked: frozenset[int] = frozenset()
    idle: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be done, in this order.

    Attributes:
        attach: in the order of their importance.
        release: program ids.
        waiting: not measured yet, or for want of room.
        more: whether another plan has more to attach at once.
    """

    attach: tuple[Target, ...] = ()
    release: tuple[int, ...] = ()
    waiting: tuple[Target, ...] = ()
    more: bool = False


@dataclass(frozen=True, slots=True)
class _Measured:
    target: Target
    since: float
    attached: float


@dataclass(slots=True)
class _Memory:
    """Of programs: what was ever seen of those that are still there. Of places: when their turn ended."""

    linked: set[int] = field(default_factory=set)
    let_go: set[int] = field(default_factory=set)
    refused: dict[int, Target] = field(default_factory=dict)
    ended: dict[tuple[str, str, int | None], float] = field(default_factory=dict)

    def keep(self, targets: Iterable[Target]) -> None:
        ids = {target.program_id for target in targets}
        places = {target.place for target in targets}
        self.linked &= ids
        self.let_go &= ids
        self.refused = {number: target for number, target in self.refused.items() if number in ids}
        self.ended = {place: at for place, at in self.ended.items() if place in places}


class TargetPlanner:
    """What is measured, and what is to change about it; whoever asks for a plan carries it out."""

    def __init__(
        self, limit: int = LIMIT, rotate_seconds: float = ROTATE_SECONDS, at_once: int = AT_ONCE
    ) -> None:
        """Measure at most `limit` programs; those in turn for `rotate_seconds` where others wait.

        A plan attaches to at most `at_once`: that takes 10 to 20 ms each, and others have their turn in between.
        """
        self._limit = limit
        self._at_once = at_once
        self._rotate = rotate_seconds
        self._measured: dict[int, _Measured] = {}
        self._memory = _Memory()

    @property
    def measured(self) -> tuple[Target, ...]:
        """What is attached to, if all plans were carried out."""
        return tuple(each.target for each in self._measured.values())

    @property
    def refused(self) -> tuple[Target, ...]:
        """What the kernel refused, as long as it is there."""
        return tuple(self._memory.refused.values())

    def refuse(self, target: Target) -> None:
        """The kernel refused this one: it is not tried again."""
        self._measured.pop(target.program_id, None)
        self._memory.refused[target.program_id] = target

    def forget(self, target: Target) -> None:
        """It was gone before it could be attached to."""
        self._measured.pop(target.program_id, None)

    def clear(self) -> Plan:
        """Measure nothing; later plans begin anew."""
        plan = Plan(release=tuple(self._measured))
        self._measured.clear()
        return plan

    def plan(self, seen: Seen, now: float) -> Plan:
        """What to change.

        Args:
            seen: what is there.
            now: seconds of any clock that does not go back.
        """
        present = {target.program_id: target for target in seen.targets}
        memory = self._memory
        memory.keep(seen.targets)
        replaced = memory.linked - seen.linked
        memory.linked |= seen.linked & present.keys()
        doubtful = {
            number
            for number, each in self._measured.items()
            if number in present and self._doubtful(each, seen, now)
        }
        memory.let_go |= doubtful
        out = replaced | doubtful | memory.refused.keys()
        # Where a measured program was replaced, its successor goes on with its turn.
        turns = {
            each.target.place: each.since
            for number, each in self._measured.items()
            if number not in present or number in replaced
        }
        wanted, waiting = self._choose(
            [target for number, target in present.items() if number not in out], turns, now
        )
        release = tuple(number for number in self._measured if number not in wanted)
        for number in release:
            memory.ended[self._measured.pop(number).target.place] = now
        new = [target for number, target in wanted.items() if number not in self._measured]
        attach, later = new[: self._at_once], new[self._at_once :]
        for target in attach:
            since = turns.get(target.place, now)
            self._measured[target.program_id] = _Measured(target, since, now)
        return Plan(tuple(attach), release, (*later, *waiting), bool(later))

    def _doubtful(self, measured: _Measured, seen: Seen, now: float) -> bool:
        """Whether to let a program go, to see whether it stays."""
        number = measured.target.program_id
        if number in self._memory.linked or number not in seen.idle:
            return False
        superseded = number not in self._memory.let_go and any(
            other.place == measured.target.place and other.program_id > number for other in seen.targets
        )
        return now - measured.attached >= (SUPERSEDED_SECONDS if superseded else FORSAKEN_SECONDS)

    def _choose(
        self, targets: Iterable[Target], turns: dict[tuple[str, str, int | None], float], now: float
    ) -> tuple[dict[int, Target], tuple[Target, ...]]:
        """Which to measure, and which wait."""
        first = sorted(
            (each for each in targets if each.priority < ROTATED_PRIORITY),
            # Those that are measured stay: two that are alike do not take turns.
            key=lambda each: (each.priority, each.program_id not in self._measured, each.program_id),
        )
        pool = sorted(
            (each for each in targets if each.priority >= ROTATED_PRIORITY),
            key=lambda each: self._rank(each, turns, now),
        )
        order = [*first, *pool]
        wanted = {each.program_id: each for each in order[: self._limit]}
        return wanted, tuple(order[self._limit :])

    def _rank(
        self, target: Target, turns: dict[tuple[str, str, int | None], float], now: float
    ) -> tuple[int, float, int, int]:
        """The order of turns: those whose turn it is, those that never or not for long had theirs, those that had it."""
        measured = self._measured.get(target.program_id)
        since = measured.since if measured else turns.get(target.place)
        if since is not None and now - since < self._rotate:
            return 0, since, target.priority, target.program_id
        if measured:
            return 2, -measured.since, target.priority, target.program_id
        ended = self._memory.ended.get(target.place, float("-inf"))
        return 1, ended, target.priority, target.program_id


def target_of(found: FoundProgram) -> Target:
    """What the planner needs of a program that was found."""
    kind, info = found.kind, found.info
    return Target(
        info.id,
        info.type,
        info.btf_id,
        info.functions[0] if info.functions else 0,
        kind.chain,
        kind.hook,
        kind.family,
        kind.priority,
        found.endpoint,
    )
