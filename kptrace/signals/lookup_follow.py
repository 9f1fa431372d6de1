# SPDX-License-Identifier: Apache-2.0
"""Keeps the brackets of one network namespace where its base chains are: planned, linked, re-planned, let go."""

from collections.abc import Iterable, Mapping
from typing import Protocol

import structlog

from kptrace.kernel.netns import NetworkNamespace
from kptrace.model.netfilter import BaseChain, IpFamily
from kptrace.model.signal import MechanismState, State
from kptrace.signals.lookup_cells import BracketLabels
from kptrace.signals.lookup_kernel import LookupKernel
from kptrace.signals.lookup_links import BracketNumbers, LinkedBoundaries
from kptrace.signals.lookup_plan import Boundary, Plan, diff, plan


class Chains(Protocol):
    """What is installed in the watched namespace (`kptrace.dataplanes.installed.InstalledChains`)."""

    def changed(self) -> bool:
        """Whether anything may have changed since the last `read`; cheap."""
        ...

    def read(self) -> tuple[BaseChain, ...]:
        """All base chains."""
        ...

    def foreign(self, own: Iterable[tuple[int, int, int]]) -> Mapping[tuple[IpFamily, int], frozenset[int]]:
        """Priorities held by others' BPF links."""
        ...

    def queues(self) -> int | None:
        """Packets waiting in NFQUEUEs; None without a queue."""
        ...

    def close(self) -> None:
        """Let the namespace go."""
        ...


class BracketFollower:
    """Owns the links; `tick` makes them follow what is installed.

    Attributes:
        state: how far that succeeds now.
        plan: what is linked, or None.
        replans: how often the links were changed.
    """

    def __init__(
        self, kernel: LookupKernel, netns: NetworkNamespace, chains: Chains, *, with_nfqueue: bool
    ) -> None:
        """Nothing is linked before the first `tick`."""
        self._netns = netns
        self._chains = chains
        self._with_nfqueue = with_nfqueue
        self._log = structlog.get_logger(signal="lookup")
        self._numbers = BracketNumbers()
        self._links = LinkedBoundaries(kernel, netns, self._numbers)
        self._refused: set[tuple[IpFamily, int, int]] = set()
        self._due = True
        self._ended = False
        self.state = _row(State.OFF, "starting")
        self.plan: Plan | None = None
        self.replans = 0

    @property
    def boundaries(self) -> tuple[Boundary, ...]:
        """What is linked now."""
        return self._links.boundaries

    @property
    def labels(self) -> Mapping[int, BracketLabels]:
        """The labels of every bracket that ever was, by its number; never changed, only replaced."""
        return self._numbers.labels

    def look_again(self) -> None:
        """Plan anew at the next tick, whether or not a change shows."""
        self._due = True

    def tick(self, *, attached: bool) -> None:
        """Follow what changed: the namespace's end, its queues, its chains.

        Args:
            attached: whether there are to be brackets at all.
        """
        if self._ended:
            return
        if self._netns.ended():
            self._let_go()
        elif self._due or self._chains.changed():
            # Until it succeeds: a re-plan may be put off.
            self._due = True
            self._follow(attached=attached)

    def _follow(self, *, attached: bool) -> None:
        waiting = self._chains.queues()
        if waiting is not None and not self._with_nfqueue:
            # Unlinking loses every packet that waits in any queue of the namespace, and linking makes it run a hook
            # twice: what is linked stays as it is.
            state = State.DEGRADED if self._links.boundaries else State.UNAVAILABLE
            detail = (
                "the namespace has an NFQUEUE: brackets stay as they are (--brackets-with-nfqueue overrides)"
            )
            self.state = _row(state, "nfqueue_present", detail)
        elif waiting:
            detail = f"{waiting} packets wait: re-planning is put off"
            self.state = _row(State.DEGRADED, "nfqueue_waiting", detail)
        elif attached:
            self._replan()
        else:
            self._links.close()
            self.plan = None
            self._due = False
            detail = "detached: the look-ups cost more than --overhead-budget"
            self.state = _row(State.OFF, "over_budget", detail)

    def _replan(self) -> None:
        chains = self._chains.read()
        new = plan(chains, self._held(), self._links.boundaries)
        change = diff(Plan((), self._links.boundaries), new)
        taken = self._links.change(change.remove, change.add)
        if change.add or change.remove:
            self.replans += 1
            self._log.info(
                "brackets_planned",
                brackets=len(new.brackets),
                linked=len(change.add),
                unlinked=len(change.remove),
            )
        self.plan = new
        # What holds a refused priority may be nothing that can be listed (SELinux, IPVS): plan around it next time.
        refused = {(b.family, int(b.hook), b.priority) for b in taken}
        self._refused = self._refused | refused if refused else set()
        self._due = bool(taken)
        self.state = _state_of(new)

    def _held(self) -> dict[tuple[IpFamily, int], set[int]]:
        """Priorities that others hold."""
        own = {(b.family.nfproto, int(b.hook), b.priority) for b in self._links.boundaries}
        held = {place: set(taken) for place, taken in self._chains.foreign(own).items()}
        for family, hook, priority in self._refused:
            held.setdefault((family, hook), set()).add(priority)
        return held

    def _let_go(self) -> None:
        # Each of them pins the namespace: the links, the netlink socket, the namespace's own descriptor.
        self._links.close()
        self._chains.close()
        self._netns.close()
        self._ended = True
        self.plan = None
        self.state = _row(State.OFF, "namespace_ended", "the watched network namespace is gone")
        self._log.warning("namespace_ended", path=str(self._netns.path))

    def close(self) -> None:
        """Unlink everything. Idempotent."""
        self._ended = True
        self._links.close()


def _state_of(new: Plan) -> MechanismState:
    if new.omitted:
        reasons = ", ".join(sorted({each.reason for each in new.omitted}))
        count = sum(len(each.chains) for each in new.omitted)
        return _row(State.DEGRADED, new.omitted[0].reason, f"{count} base chains are not measured: {reasons}")
    if new.brackets:
        return _row(State.ACTIVE, "ok", f"{len(new.brackets)} brackets")
    return _row(State.ACTIVE, "no_base_chains", "no base chain is installed in the watched namespace")


def _row(state: State, reason: str, detail: str = "") -> MechanismState:
    return MechanismState("lookup", "bracket", state, reason, detail)
