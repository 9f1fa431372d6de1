# SPDX-License-Identifier: Apache-2.0
"""Calls of several CPUs in the order in which they ended. Pure."""

import heapq
import itertools
from collections.abc import Iterable, Iterator

from kptrace.signals.map_write_records import MapWrite, Replacement

Call = MapWrite | Replacement


class InOrder:
    """Holds calls back until no earlier one can come any more.

    Attributes:
        late: calls that came after a later one had been handed over; these come out of order.
    """

    def __init__(self) -> None:
        """Nothing is held back."""
        self._heap: list[tuple[int, int, int, int, Call]] = []
        self._arrival = itertools.count()
        self._last: Call | None = None
        self.late = 0

    def put(self, call: Call) -> None:
        """Hold a call back."""
        if self._last is not None and call.end_ns < self._last.end_ns:
            self.late += 1
        heapq.heappush(self._heap, (call.end_ns, call.tid, call.begin_ns, next(self._arrival), call))

    def until(self, until_ns: int) -> Iterator[Call]:
        """Those that ended by then, each once, whoever ended at the same time by thread."""
        while self._heap and self._heap[0][0] <= until_ns:
            call = heapq.heappop(self._heap)[-1]
            if call != self._last:
                self._last = call
                yield call

    def held(self) -> Iterable[Call]:
        """What is held back, in no order."""
        return (entry[-1] for entry in self._heap)
