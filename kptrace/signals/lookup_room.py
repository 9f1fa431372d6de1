# SPDX-License-Identifier: Apache-2.0
"""Free priorities in one hook, and which of them two neighbouring brackets' boundaries take. Pure."""

from dataclasses import dataclass
from typing import Final

#: The kernel refuses netfilter links at these two, `NF_IP_PRI_FIRST` and `NF_IP_PRI_LAST`.
INT_MIN: Final = -(2**31)
INT_MAX: Final = 2**31 - 1


def free_below(priority: int, held: frozenset[int], bottom: int = INT_MIN) -> int | None:
    """The highest priority below that nobody holds and that is above `bottom`."""
    priority -= 1
    while priority in held:
        priority -= 1
    return priority if priority > bottom else None


def free_above(priority: int, held: frozenset[int], top: int = INT_MAX) -> int | None:
    """The lowest priority above that nobody holds and that is below `top`."""
    priority += 1
    while priority in held:
        priority += 1
    return priority if priority < top else None


@dataclass(frozen=True, slots=True)
class Linked:
    """Priorities of boundaries that we have already between two brackets.

    Attributes:
        both: it closes the one and opens the other.
        close: it only closes the one.
        open: it only opens the other.
    """

    both: int | None = None
    close: int | None = None
    open: int | None = None


@dataclass(frozen=True, slots=True)
class Room:
    """Who is where in one hook.

    Attributes:
        firm: priorities of base chains and of the kernel's own hooks: none may come between a bracket's boundary and
            its chains, if that can be avoided.
        held: those, and whatever else others hold (other tracers' links): nothing can be linked there.
        own: where we have links now, whether or not they stay.
    """

    firm: frozenset[int]
    held: frozenset[int]
    own: frozenset[int]

    def between(self, last: int | None, first: int | None, linked: Linked) -> tuple[int | None, int | None]:
        """Where a bracket closes whose last chain is at `last`, and where the next one opens whose first is at `first`.

        The two are equal where one boundary does both. None stands for no such bracket, and so for no such boundary.
        The caller knows that there is a free priority.
        """
        low = None if last is None else free_above(last, self.held)
        high = None if first is None else free_below(first, self.held)
        if low is None or high is None:
            return (
                None if low is None else self._closing(low, linked.close, INT_MAX),
                None if high is None else self._opening(high, linked.open, INT_MIN),
            )
        both = linked.both
        if (
            both is not None
            and low <= both <= high
            and both not in self.held
            and self._clear(low, high, self.firm)
        ):
            return both, both
        keeps_close = linked.close is not None and self._closing(low, linked.close, high) == linked.close
        keeps_open = linked.open is not None and self._opening(high, linked.open, low) == linked.open
        if keeps_close or keeps_open or not self._clear(low, high, self.held):
            bottom = linked.close if keeps_close and linked.close is not None else low
            opening = self._opening(high, linked.open, bottom)
            closing = self._closing(low, linked.close, opening)
            if closing < opening:
                return closing, opening
        single = self._spot(high, -1, low - 1)
        return single, single

    def _closing(self, low: int, linked: int | None, top: int) -> int:
        if linked is not None and low <= linked < top and self._stays(linked, low, linked):
            return linked
        return self._spot(low, 1, top)

    def _opening(self, high: int, linked: int | None, bottom: int) -> int:
        if linked is not None and bottom < linked <= high and self._stays(linked, linked, high):
            return linked
        return self._spot(high, -1, bottom)

    def _stays(self, linked: int, low: int, high: int) -> bool:
        return linked not in self.held and self._clear(low, high, self.firm)

    def _spot(self, start: int, step: int, end: int) -> int:
        """The first priority from `start` on where we have no link yet: the new can be linked before the old goes.

        `start` itself, if somebody else or the end comes first.
        """
        priority = start
        while priority != end and priority not in self.held:
            if priority not in self.own:
                return priority
            priority += step
        return start

    @staticmethod
    def _clear(low: int, high: int, marks: frozenset[int]) -> bool:
        return not any(low < mark < high for mark in marks)
