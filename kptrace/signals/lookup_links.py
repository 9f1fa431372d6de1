# SPDX-License-Identifier: Apache-2.0
"""Keeps the linked boundaries equal to a plan, by the smallest change: an unchanged boundary is never unlinked."""

import os
from collections.abc import Iterable

import structlog

from kptrace.kernel.attach import PriorityTaken
from kptrace.kernel.netns import NetworkNamespace
from kptrace.model.netfilter import Hook
from kptrace.signals.lookup_cells import MAX_BRACKETS, BracketLabels
from kptrace.signals.lookup_kernel import NO_BRACKET, BoundaryProgram, LookupKernel
from kptrace.signals.lookup_plan import Boundary, Bracket
from kptrace.signals.lookup_services import PLANES

#: Numbers 0 to 125 are brackets', 126 is shared by those beyond, 127 is the floor's.
_SHARED_NUMBER = MAX_BRACKETS - 2


class BracketNumbers:
    """A number for each set of labels, kept for ever, so that nothing resets when chains go and come back."""

    def __init__(self) -> None:
        """No numbers are given yet."""
        self.labels: dict[int, BracketLabels] = {}
        self._numbers: dict[BracketLabels, int] = {}

    def of(self, bracket: Bracket) -> int:
        """The bracket's number."""
        labels = BracketLabels(bracket.dataplane, bracket.family, bracket.hook, bracket.table, bracket.chain)
        number = self._numbers.get(labels)
        if number is None:
            if len(self._numbers) >= _SHARED_NUMBER:
                return _SHARED_NUMBER
            number = len(self._numbers)
            self._numbers[labels] = number
            # Replaced, never changed: scrapes iterate over it in other threads.
            self.labels = {**self.labels, number: labels}
        return number


class LinkedBoundaries:
    """The links of one network namespace."""

    def __init__(self, kernel: LookupKernel, netns: NetworkNamespace, numbers: BracketNumbers) -> None:
        """Nothing is linked yet."""
        self._kernel = kernel
        self._netns = netns
        self._numbers = numbers
        self._log = structlog.get_logger()
        self._links: dict[Boundary, int] = {}

    @property
    def boundaries(self) -> tuple[Boundary, ...]:
        """What is linked now."""
        return tuple(self._links)

    def change(self, remove: Iterable[Boundary], add: Iterable[Boundary]) -> list[Boundary]:
        """Unlink and link; return the boundaries whose priority somebody else took meanwhile.

        What is new is linked before what is old goes, so that no packet meets half a bracket; only where both want one
        priority the old one goes first.
        """
        adding, removing = list(add), list(remove)
        wanted = {(boundary.family, boundary.hook, boundary.priority) for boundary in adding}
        in_the_way = [b for b in removing if (b.family, b.hook, b.priority) in wanted]
        for boundary in in_the_way:
            os.close(self._links.pop(boundary))
        taken = self._link(adding)
        for boundary in removing:
            if boundary not in in_the_way:
                os.close(self._links.pop(boundary))
        return taken

    def _link(self, boundaries: Iterable[Boundary]) -> list[Boundary]:
        taken = []
        with self._netns.enter():
            for boundary in boundaries:
                try:
                    self._links[boundary] = self._kernel.link_boundary(
                        self._program(boundary), Hook(boundary.hook), boundary.priority
                    )
                except PriorityTaken:
                    self._log.warning("priority_taken", hook=boundary.hook.label, priority=boundary.priority)
                    taken.append(boundary)
        return taken

    def close(self) -> None:
        """Unlink everything. Idempotent."""
        for link in self._links.values():
            os.close(link)
        self._links.clear()

    def _program(self, boundary: Boundary) -> BoundaryProgram:
        opens = boundary.opens
        plane = 0
        if opens is not None and opens.nat and opens.hook in (Hook.PREROUTING, Hook.OUTPUT):
            plane = 1 + (PLANES.index(opens.dataplane) if opens.dataplane in PLANES else len(PLANES) - 1)
        return BoundaryProgram(
            closes=NO_BRACKET if boundary.closes is None else self._numbers.of(boundary.closes),
            opens=NO_BRACKET if opens is None else self._numbers.of(opens),
            walk_mask=0 if opens is None else opens.walk_mask,
            family=boundary.family,
            plane=plane,
        )
