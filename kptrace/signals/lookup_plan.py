# SPDX-License-Identifier: Apache-2.0
"""Where the brackets go: from the installed base chains to the links that enclose them, and the smallest change. Pure.

A bracket's opening takes the highest free priority below its chains, its closing the lowest above: so it encloses as
little else as possible, and conntrack (-200) in particular only where nothing else is possible. One boundary closes a
bracket and opens the next where nothing lies between them. Chains with no free priority between them share a bracket.

What is linked stays wherever it is still right: unlinking loses the packets that are inside the bracket, and every
packet that waits in an NFQUEUE.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Final

from kptrace.dataplanes.nftables.chains import any_nat
from kptrace.model.netfilter import (
    NAT_DST_PRIORITY,
    NAT_SRC_PRIORITY,
    BaseChain,
    ChainType,
    Hook,
    IpFamily,
)
from kptrace.signals.lookup_brackets import (
    CONNTRACK_PRIORITY,
    ENTRY_HOOKS,
    Boundary,
    Bracket,
    Omitted,
    Plan,
    PlanDiff,
    diff,
)
from kptrace.signals.lookup_names import Names, dataplane_of, is_known
from kptrace.signals.lookup_room import Linked, Room, free_above, free_below

__all__ = ["Boundary", "Bracket", "Limits", "Omitted", "Plan", "PlanDiff", "diff", "fixed_priorities", "plan"]

DEFRAG_PRIORITY: Final = -400
_IPS_DST_NAT_DONE, _IPS_SRC_NAT_DONE = 0x100, 0x80

Place = tuple[IpFamily, int]


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of a plan.

    Attributes:
        brackets: in total.
        names: foreign (table, chain) names that are told apart; the rest is `~other`.
        hook_entries: how full a hook may get, of the kernel's 1,024 (`MAX_HOOK_COUNT`): the rest is for the writers.
    """

    brackets: int = 126
    names: int = 32
    hook_entries: int = 896


@dataclass(frozen=True, slots=True)
class _Run:
    """Chains that one bracket is to enclose."""

    chains: tuple[BaseChain, ...]

    @property
    def place(self) -> tuple[IpFamily, Hook]:
        return self.chains[0].family, self.chains[0].hook

    @property
    def rank(self) -> tuple[int, IpFamily, Hook, int]:
        """What is measured first where not everything can be: service NAT, then kube-proxy's and iptables' chains."""
        nat = self.place[1] in ENTRY_HOOKS and any(chain.type is ChainType.NAT for chain in self.chains)
        group = 0 if nat else 1 if any(map(is_known, self.chains)) else 2
        return group, *self.place, self.chains[0].effective_priority


def plan(
    chains: Iterable[BaseChain],
    foreign: Mapping[Place, Collection[int]],
    linked: Iterable[Boundary] = (),
    limits: Limits | None = None,
) -> Plan:
    """Plan the brackets of one network namespace.

    Args:
        chains: all base chains.
        foreign: priorities by (family, hook) that others hold besides base chains: BPF links that are not in `linked`,
            IPVS. Conntrack's, defragmentation's and NAT's are known here.
        linked: our own boundaries as they are now.
        limits: bounds.
    """
    limits = limits or Limits()
    every = sorted(chains, key=lambda c: (c.family, c.hook, c.effective_priority, c))
    nat = {family: any_nat(every, family) for family in IpFamily}
    own = tuple(linked)
    rooms: dict[tuple[IpFamily, Hook], Room] = {}
    runs: list[_Run] = []
    omitted: list[Omitted] = []
    for place, here in groupby(every, key=lambda c: (c.family, c.hook)):
        members = tuple(here)
        stops = {chain.effective_priority for chain in members}
        firm = stops | fixed_priorities(place[1], nat=nat[place[0]])
        rooms[place] = Room(
            firm=frozenset(firm),
            held=frozenset(firm | set(foreign.get(place, ()))),
            own=frozenset(b.priority for b in own if (b.family, b.hook) == place),
        )
        for run in _runs(members, rooms[place].held):
            if _has_room(run, rooms[place].held):
                runs.append(run)
            else:
                omitted.append(Omitted(run.chains, "no_free_priority"))
    chosen, refused = _choose(runs, {place: len(room.held) for place, room in rooms.items()}, limits)
    told = [
        b
        for each in own
        for b in (each.closes, each.opens)
        if b is not None and not any(map(is_known, b.chains))
    ]
    names = Names([run.chains for run in chosen], ((b.table, b.chain) for b in told), limits.names)
    brackets = [_bracket(run, names, nat=nat[run.place[0]]) for run in chosen]
    boundaries: list[Boundary] = []
    for place, here_too in groupby(brackets, key=lambda b: (b.family, b.hook)):
        boundaries.extend(_boundaries(tuple(here_too), rooms[place], own))
    return Plan(tuple(brackets), tuple(boundaries), (*omitted, *refused))


def fixed_priorities(hook: Hook, *, nat: bool) -> frozenset[int]:
    """Where the kernel's own hooks sit that are no base chains; `nat`: whether the family has any NAT chain.

    Conntrack's and defragmentation's come with the first rule that needs them; their places are kept free before.
    """
    if hook in ENTRY_HOOKS:
        return frozenset({DEFRAG_PRIORITY, CONNTRACK_PRIORITY, *((NAT_DST_PRIORITY,) if nat else ())})
    return frozenset({NAT_SRC_PRIORITY}) if nat and hook is not Hook.FORWARD else frozenset()


def _runs(chains: tuple[BaseChain, ...], held: frozenset[int]) -> Iterable[_Run]:
    """Cut one hook's chains, sorted by effective priority, wherever a priority is free between two of them."""
    run = [chains[0]]
    for chain in chains[1:]:
        last = run[-1].effective_priority
        if chain.effective_priority > last and free_below(chain.effective_priority, held, last) is not None:
            yield _Run(tuple(run))
            run = []
        run.append(chain)
    yield _Run(tuple(run))


def _has_room(run: _Run, held: frozenset[int]) -> bool:
    first, last = run.chains[0].effective_priority, run.chains[-1].effective_priority
    return free_below(first, held) is not None and free_above(last, held) is not None


def _choose(
    runs: Iterable[_Run], entries: Mapping[tuple[IpFamily, Hook], int], limits: Limits
) -> tuple[list[_Run], list[Omitted]]:
    """The runs that fit the limits, by family, hook and priority, and the others."""
    chosen: list[_Run] = []
    refused: list[Omitted] = []
    full = dict(entries)
    for run in sorted(runs, key=lambda run: run.rank):
        if len(chosen) >= limits.brackets:
            refused.append(Omitted(run.chains, "max_brackets"))
        elif full[run.place] + 2 > limits.hook_entries:
            refused.append(Omitted(run.chains, "hook_full"))
        else:
            full[run.place] += 2
            chosen.append(run)
    return sorted(chosen, key=lambda run: (*run.place, run.chains[0].effective_priority)), refused


def _bracket(run: _Run, names: Names, *, nat: bool) -> Bracket:
    family, hook = run.place
    mask = 0
    if nat and hook is not Hook.FORWARD:
        mask = _IPS_DST_NAT_DONE if hook in ENTRY_HOOKS else _IPS_SRC_NAT_DONE
    table, chain = names.label(run.chains)
    return Bracket(
        family=family,
        hook=hook,
        priority=run.chains[0].effective_priority,
        dataplane=dataplane_of(run.chains),
        table=table,
        chain=chain,
        nat=any(each.type is ChainType.NAT for each in run.chains),
        walk_mask=mask,
        chains=run.chains,
        members=names.members(run.chains),
    )


def _boundaries(brackets: tuple[Bracket, ...], room: Room, own: tuple[Boundary, ...]) -> Iterable[Boundary]:
    """The boundaries of one hook's brackets, in the order of their priorities."""
    family, hook = brackets[0].family, brackets[0].hook
    linked: dict[tuple[Bracket | None, Bracket | None], int] = {
        (b.closes, b.opens): b.priority for b in own if (b.family, b.hook) == (family, hook)
    }
    for before, after in zip((None, *brackets), (*brackets, None), strict=True):
        closing, opening = room.between(
            before.chains[-1].effective_priority if before else None,
            after.priority if after else None,
            Linked(
                both=linked.get((before, after)),
                close=linked.get((before, None)),
                open=linked.get((None, after)),
            ),
        )
        if closing is not None and closing == opening:
            yield Boundary(family, hook, closing, before, after)
            continue
        if closing is not None:
            yield Boundary(family, hook, closing, before, None)
        if opening is not None:
            yield Boundary(family, hook, opening, None, after)
