# SPDX-License-Identifier: Apache-2.0
"""What the demo found, as a table and as JSON: pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LookupRow:
    """First packets of one data plane at one size.

    Attributes:
        dataplane, services: the cell.
        sent: first packets that the clients sent.
        counted: first packets that kptrace measured at the NAT chain of PREROUTING.
        p50_ns, p99_ns: of their look-ups.
    """

    dataplane: str
    services: int
    sent: int
    counted: int
    p50_ns: float
    p99_ns: float


@dataclass(frozen=True, slots=True)
class RewriteRow:
    """One-endpoint changes of one data plane at one size.

    Attributes:
        dataplane, services: the cell.
        writes: kernel transactions that kptrace saw committed in the table that translates Service addresses.
        made: those that the writer made.
        p50_ms, p99_ms: how long the kernel took.
        objects: rules, chains, elements that they added or removed.
    """

    dataplane: str
    services: int
    writes: int
    made: int
    p50_ms: float
    p99_ms: float
    objects: int


@dataclass(frozen=True, slots=True)
class DemoResult:
    """All cells.

    Attributes:
        lookup, rewrite: one row a cell.
        startup_seconds: the slowest start of a daemon, from its exec to ready.
        losses: samples and events that the daemons counted as lost.
        metrics: a few lines of the last live /metrics.
    """

    lookup: tuple[LookupRow, ...]
    rewrite: tuple[RewriteRow, ...]
    startup_seconds: float
    losses: int
    metrics: tuple[str, ...] = ()

    @property
    def exact(self) -> bool:
        """Whether every packet sent was counted, and nothing lost."""
        return self.losses == 0 and all(row.sent == row.counted for row in self.lookup)

    def as_json(self) -> dict[str, object]:
        """What `kptrace demo --json` prints. A quantile of nothing is null."""
        return {
            "lookup": [
                {
                    "dataplane": row.dataplane,
                    "services": row.services,
                    "sent": row.sent,
                    "counted": row.counted,
                    "p50_ns": _number(row.p50_ns, 0),
                    "p99_ns": _number(row.p99_ns, 0),
                }
                for row in self.lookup
            ],
            "rewrite": [
                {
                    "dataplane": row.dataplane,
                    "services": row.services,
                    "writes": row.writes,
                    "p50_ms": _number(row.p50_ms, 3),
                    "p99_ms": _number(row.p99_ms, 3),
                    "objects": row.objects,
                }
                for row in self.rewrite
            ],
            "startup_seconds": round(self.startup_seconds, 3),
            "losses": self.losses,
        }

    def as_table(self) -> str:
        """The same for people."""
        head = (
            "data plane",
            "services",
            "sent",
            "counted",
            "p50",
            "p99",
            "rewrites",
            "p50",
            "p99",
            "objects",
        )
        rewrites = {(row.dataplane, row.services): row for row in self.rewrite}
        rows: list[Sequence[str]] = [head]
        for row in self.lookup:
            rewrite = rewrites.get((row.dataplane, row.services))
            cells = [row.dataplane, f"{row.services}", f"{row.sent}", f"{row.counted}"]
            cells += [_time(row.p50_ns), _time(row.p99_ns)]
            if rewrite is not None:
                cells += [f"{rewrite.writes}", _time(rewrite.p50_ms * 1e6), _time(rewrite.p99_ms * 1e6)]
                cells.append(f"{rewrite.objects}")
            rows.append(cells)
        widths = [max(len(row[column]) for row in rows if column < len(row)) for column in range(len(head))]
        lines = []
        for cells_of_row in rows:
            first = cells_of_row[0].ljust(widths[0])
            rest = (cell.rjust(width) for cell, width in zip(cells_of_row[1:], widths[1:], strict=False))
            lines.append("  ".join([first, *rest]).rstrip())
        lines.append(f"slowest start {self.startup_seconds:.2f} s, losses {self.losses}")
        return "\n".join(lines) + "\n"


def _number(value: float, digits: int) -> float | int | None:
    if math.isnan(value):
        return None
    return round(value, digits) if digits else round(value)


def _time(nanoseconds: float) -> str:
    """A duration with three figures."""
    if math.isnan(nanoseconds):
        return "-"
    for limit, divisor, unit in ((1e3, 1.0, "ns"), (1e6, 1e3, "us"), (1e9, 1e6, "ms")):
        if nanoseconds < limit:
            return f"{nanoseconds / divisor:.3g} {unit}"
    return f"{nanoseconds / 1e9:.3g} s"
