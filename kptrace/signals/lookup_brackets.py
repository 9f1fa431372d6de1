# SPDX-License-Identifier: Apache-2.0
"""Brackets, the boundaries that make them, and the difference between two plans. Pure."""

from dataclasses import dataclass, field
from typing import Final, Literal

from kptrace.model.netfilter import BaseChain, DataPlane, Hook, IpFamily

CONNTRACK_PRIORITY: Final = -200
#: The hooks where a connection enters: conntrack looks it up there, and destination NAT is done.
ENTRY_HOOKS: Final = (Hook.PREROUTING, Hook.OUTPUT)

#: A (table, chain) pair of label values.
Name = tuple[str, str]
Reason = Literal["no_free_priority", "max_brackets", "hook_full"]


@dataclass(frozen=True, slots=True)
class Bracket:
    """One pair of boundaries around the chains that have one effective priority, or no free one between them.

    Two brackets are equal if the same programs serve them: the chains within may change.

    Attributes:
        family, hook: of the chains.
        priority: the lowest effective priority of them.
        dataplane, table, chain: label values: the chain's own names; `~shared` and `priority<N>` for several chains;
            `~other` beyond the bound on foreign names.
        nat: whether NAT's rules are walked in it.
        walk_mask: `nf_conn.status` bits that say that NAT is done at this hook: packets without them walk its rules.
            0 at FORWARD, and where the family has no NAT chain.
        chains: what it encloses, by effective priority.
        members: the chains' (table, chain) names, as bounded as labels are.
    """

    family: IpFamily
    hook: Hook
    priority: int
    dataplane: DataPlane
    table: str
    chain: str
    nat: bool
    walk_mask: int
    chains: tuple[BaseChain, ...] = field(default=(), compare=False)
    members: tuple[Name, ...] = field(default=(), compare=False)


@dataclass(frozen=True, slots=True)
class Boundary:
    """One program to link: it ends the bracket before it, begins the one after it, or both."""

    family: IpFamily
    hook: Hook
    priority: int
    closes: Bracket | None = None
    opens: Bracket | None = None


@dataclass(frozen=True, slots=True)
class Omitted:
    """Chains that are not measured.

    Reasons: `no_free_priority` (the kernel refuses links at INT_MIN and INT_MAX, and nothing else is free beyond the
    chain), `max_brackets`, `hook_full`.
    """

    chains: tuple[BaseChain, ...]
    reason: Reason


@dataclass(frozen=True, slots=True)
class Plan:
    """Brackets, the boundaries that make them, by family, hook and priority, and what could not be planned."""

    brackets: tuple[Bracket, ...]
    boundaries: tuple[Boundary, ...]
    omitted: tuple[Omitted, ...] = ()


@dataclass(frozen=True, slots=True)
class PlanDiff:
    """How to get from one plan to another.

    Attributes:
        add: to link, closing ones first: a packet that only meets a closing is no loss, one that only meets an opening
            is one.
        remove: to unlink, opening ones first. Linking before unlinking loses no packet; it is possible where no
            priority in `add` is one in `remove`, and the planner avoids that as far as it can.
        keep: not to be touched; the old plan's own objects.
    """

    add: tuple[Boundary, ...]
    remove: tuple[Boundary, ...]
    keep: tuple[Boundary, ...]


def diff(old: Plan, new: Plan) -> PlanDiff:
    """The smallest change of links that makes the new plan of the old one."""
    have, want = set(old.boundaries), set(new.boundaries)

    def by_priority(boundary: Boundary) -> tuple[int, IpFamily, Hook]:
        return boundary.priority, boundary.family, boundary.hook

    return PlanDiff(
        add=tuple(sorted(want - have, key=by_priority, reverse=True)),
        remove=tuple(sorted(have - want, key=by_priority)),
        keep=tuple(boundary for boundary in old.boundaries if boundary in want),
    )
