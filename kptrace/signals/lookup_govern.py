# SPDX-License-Identifier: Apache-2.0
"""What the lookup programs cost, estimated from how many packets they met, and the sampling that keeps it in a budget."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple

from structlog.typing import FilteringBoundLogger

from kptrace.signals.sampling import Governor, Sampling


@dataclass(frozen=True, slots=True)
class Costs:
    """Nanoseconds for one packet that is timed, and for one that is not; see docs/overhead.md."""

    sampled: float
    unsampled: float


#: A fentry and fexit pair, at a function or at a program: guest instructions (docs/overhead.md), two a nanosecond as the
#: bracket's take where both were measured.
TRACING_PAIR: Final = Costs(490.0, 215.0)


class Governed(NamedTuple):
    """What the end of a period changed: the sampling, and whether anything is to be attached at all."""

    sampling: bool
    attached: bool


class OverheadGovernor:
    """A `Governor` with a clock.

    Attributes:
        overhead: share of one core in the last period.
    """

    def __init__(
        self, wanted: Sampling, budget: float, costs: Costs, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Start at the sampling that is wanted; a budget of 0 is none."""
        self._governor = Governor(wanted, budget or float("inf"))
        self._costs = costs
        self._clock = clock
        self._stepped_at = clock()
        self._opened = (0, 0)
        self.overhead = 0.0

    @property
    def attached(self) -> bool:
        """Whether anything is to be attached at all."""
        return self._governor.attached

    @property
    def factor(self) -> int:
        """What the wanted divisors are multiplied by; 0 means detached."""
        return self._governor.factor

    def sampling(self) -> Sampling:
        """The divisors in force."""
        return self._governor.sampling()

    def ratios(self) -> tuple[float, float]:
        """The share of first packets, and of the rest, that is timed while attached."""
        sampling = self.sampling()
        return 1 / sampling.first, 1 / sampling.rest

    def step(self, opened: tuple[int, int]) -> bool:
        """End a period; `opened` counts sampled packets from the start, first ones and the rest.

        Returns:
            Whether the sampling changed.
        """
        now = self._clock()
        elapsed = max(now - self._stepped_at, 1e-3)
        first, rest = (new - old for new, old in zip(opened, self._opened, strict=True))
        self._stepped_at, self._opened = now, opened
        sampling = self.sampling()
        skipped = rest * (sampling.rest - 1) + first * (sampling.first - 1)
        cost = (first + rest) * self._costs.sampled + skipped * self._costs.unsampled
        self.overhead = cost / 1e9 / elapsed
        before, self._governor = self._governor, self._governor.step(self.overhead)
        return self._governor.factor != before.factor

    def govern(self, opened: tuple[int, int], log: FilteringBoundLogger) -> Governed:
        """`step`, and say so where the sampling changed."""
        before = self.attached
        changed = self.step(opened)
        if changed:
            log.warning("sampling_changed", factor=self.factor, overhead=round(self.overhead, 5))
        return Governed(changed, self.attached is not before)
