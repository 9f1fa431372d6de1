# SPDX-License-Identifier: Apache-2.0
"""The last changes whose fate is known, as /status shows them. Pure."""

from collections import deque
from collections.abc import Callable, Mapping
from typing import Final

from kptrace.signals.programming_events import Result

#: Changes that /status shows: a roll-out of 44 endpoints, each replaced, and some.
RECENT: Final = 100


class RecentChanges:
    """`add` is for one thread, `rows` for any."""

    def __init__(self, unix_ns: Callable[[int], int]) -> None:
        """`unix_ns` makes nanoseconds since 1970 of CLOCK_MONOTONIC nanoseconds."""
        self._unix_ns = unix_ns
        self._last: deque[Result] = deque(maxlen=RECENT)

    def add(self, result: Result) -> None:
        """The fate of one more."""
        self._last.append(result)

    def rows(self, *, names: bool, of: tuple[str, str] | None = None) -> list[Mapping[str, object]]:
        """JSON values, the newest first; names of Services and addresses only where `names`.

        Args:
            names: whether they may be shown.
            of: namespace and name of a Service: its changes only.
        """
        offset = self._unix_ns(0)  # once for all, so that they can be compared
        return [
            _row(result, offset, names=names)
            for result in reversed(tuple(self._last))
            if of is None or (result.change.port.namespace, result.change.port.name) == of
        ]


def _row(result: Result, offset_ns: int, *, names: bool) -> Mapping[str, object]:
    change, commit = result.change, result.commit
    row: dict[str, object] = {"change": change.kind.value, "family": change.family.value}
    if names:
        port = change.port
        row["service"] = f"{port.namespace}/{port.name}:{port.port}/{port.protocol.name.lower()}"
        if change.ip:
            where = f"[{change.ip}]" if ":" in change.ip else change.ip
            row["address"] = f"{where}:{change.number}"
    row |= {"fate": result.fate.value, "received": (offset_ns + change.received_ns) / 1e9}
    if commit is not None:
        row |= {
            "dataplane": commit.dataplane.value,
            "committed": (offset_ns + commit.end_ns) / 1e9,
            "ms": round(result.duration_ns / 1e6, 3),
            "attribution": str(result.attribution or ""),
        }
    if result.reason is not None:
        row["reason"] = result.reason.value
    return row
