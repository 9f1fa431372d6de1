# SPDX-License-Identifier: Apache-2.0
"""What scrapes and /status read of the rewrite signal's ruleset."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from kptrace.model.metrics import MetricFamily, Sample
from kptrace.model.signal import MechanismState
from kptrace.signals import rewrite_metrics as metrics
from kptrace.signals.rewrite_objects import Row


@dataclass(frozen=True, slots=True)
class Published:
    """Replaced as a whole by the loop's thread.

    Attributes:
        state: of the signal.
        rows: numbers of objects.
        exact: whether these are exact.
        generation: of the ruleset, None where it is unknown.
    """

    state: MechanismState
    rows: Mapping[Row, int] = field(default_factory=lambda: MappingProxyType({}))
    exact: bool = False
    generation: int | None = None

    def ruleset(self) -> Mapping[str, object]:
        """For /status."""
        return {
            "generation": "unknown" if self.generation is None else self.generation,
            "sizes are exact": self.exact,
            "objects": sum(self.rows.values()),
        }

    def families(self) -> Iterable[MetricFamily]:
        """For a scrape."""
        yield MetricFamily(
            metrics.RULESET, [Sample(row, float(count)) for row, count in sorted(self.rows.items())]
        )
        yield MetricFamily(metrics.EXACT, [Sample((), float(self.exact))])
        if self.generation is not None:
            yield MetricFamily(metrics.GENERATION, [Sample((), float(self.generation))])
