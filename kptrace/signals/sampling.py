# SPDX-License-Identifier: Apache-2.0
"""Which share of the packets is sampled, and the governor that keeps the cost within a budget. Pure."""

from dataclasses import dataclass, replace

from kptrace.model.errors import UsageError

#: A 32-bit random number is below this for every packet.
ALWAYS = 1 << 32
#: The divisor of first packets is raised up to here; if that is not enough, the brackets detach.
MAX_DIVISOR = 1 << 16


@dataclass(frozen=True, slots=True)
class Sampling:
    """One in `first` first packets, and one in `rest` of the others, is timed."""

    first: int = 1
    rest: int = 64

    @classmethod
    def parse(cls, text: str) -> "Sampling":
        """Read `--sample`: `all`, `REST` or `FIRST:REST` (`1:64`).

        Raises:
            UsageError: it is none of these.
        """
        if text == "all":
            return cls(1, 1)
        parts = text.split(":")
        try:
            numbers = [int(part) for part in parts]
        except ValueError:
            numbers = []
        if len(numbers) not in (1, 2) or not all(1 <= number <= MAX_DIVISOR for number in numbers):
            raise UsageError(
                f"--sample {text!r} is not a divisor",
                remedy=f"give 'all', REST or FIRST:REST, each 1 to {MAX_DIVISOR}",
            )
        return cls(1, numbers[0]) if len(numbers) == 1 else cls(numbers[0], numbers[1])

    def thresholds(self) -> tuple[int, int]:
        """What the kernel compares a random 32-bit number with, for first packets and for the rest."""
        return ALWAYS // self.first, ALWAYS // self.rest


@dataclass(frozen=True, slots=True)
class Governor:
    """Keeps the cost of sampling below a budget by raising the divisors, and lowers them again.

    Attributes:
        wanted: what the user asked for.
        budget: share of one core.
        factor: what the wanted divisors are multiplied by now; 0 means detached.
        calm: how many steps in a row the cost was far below the budget.
    """

    wanted: Sampling
    budget: float
    factor: int = 1
    calm: int = 0

    #: Cost of one sampled packet in ns, as `make bench` measures it on the reference machine, and of one not sampled.
    def step(self, cost: float) -> "Governor":
        """The governor after one period in which the cost was `cost` (share of one core).

        Above the budget the factor doubles until the divisor of the rest is at its limit, then the brackets detach;
        after four periods below a quarter of the budget it halves, and detached brackets come back at the highest
        divisor.
        """
        limit = MAX_DIVISOR // self.wanted.rest
        if cost > self.budget:
            if self.factor == 0:
                return replace(self, calm=0)
            return replace(self, factor=self.factor * 2 if self.factor < limit else 0, calm=0)
        if cost * 4 >= self.budget and self.factor != 0:
            return replace(self, calm=0)
        if self.factor == 1:
            return self if self.calm == 0 else replace(self, calm=0)
        if self.calm + 1 < 4:
            return replace(self, calm=self.calm + 1)
        return replace(self, factor=self.factor // 2 if self.factor else max(1, limit), calm=0)

    @property
    def attached(self) -> bool:
        """Whether the brackets are to be linked at all."""
        return self.factor != 0

    def sampling(self) -> Sampling:
        """The divisors in force. First packets are thinned last: only by what the rest cannot give."""
        rest = min(MAX_DIVISOR, self.wanted.rest * max(1, self.factor))
        first = min(MAX_DIVISOR, self.wanted.first * max(1, self.factor // 64))
        return Sampling(first, rest)
