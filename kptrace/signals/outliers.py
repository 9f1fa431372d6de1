# SPDX-License-Identifier: Apache-2.0
"""What is slow: compared with what the same thing took lately. Pure."""

from collections import OrderedDict, deque
from collections.abc import Hashable
from dataclasses import dataclass
from statistics import median
from typing import Final

#: Durations that are remembered of each thing, and things.
WINDOW: Final = 64
MAX_LANES: Final = 256


@dataclass(frozen=True, slots=True)
class Limits:
    """When something is slow.

    Attributes:
        least_ns: nothing quicker is ever slow.
        always_ns: everything that takes so long is.
        times: as many times the median of the last ones.
        enough: as many are needed for a median.
    """

    least_ns: int
    always_ns: int
    times: float = 3.0
    enough: int = 8


class Outliers:
    """Remembers durations by lane: a writer's runs in one data plane, say. Bounded."""

    def __init__(self, limits: Limits) -> None:
        """Nothing is usual yet."""
        self._limits = limits
        self._lanes: OrderedDict[Hashable, deque[int]] = OrderedDict()

    def usual_ns(self, lane: Hashable) -> int | None:
        """The median of the last durations; None where they are too few."""
        known = self._lanes.get(lane, ())
        return round(median(known)) if len(known) >= self._limits.enough else None

    def judge(self, lane: Hashable, duration_ns: int) -> bool:
        """Whether one is slow beside those before it; it is remembered with them."""
        usual = self.usual_ns(lane)
        limits = self._limits
        slow = duration_ns >= limits.always_ns or (
            usual is not None and duration_ns >= max(limits.least_ns, round(limits.times * usual))
        )
        self._lanes.setdefault(lane, deque(maxlen=WINDOW)).append(duration_ns)
        self._lanes.move_to_end(lane)
        if len(self._lanes) > MAX_LANES:
            self._lanes.popitem(last=False)
        return slow
