# SPDX-License-Identifier: Apache-2.0
"""Sources as one scrape: each isolated from the others, the number of series bounded."""

import gzip
import time
from collections.abc import Callable, Iterable, Sequence
from threading import Lock

import structlog
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric

from kptrace.export.folding import Folder, cost
from kptrace.export.samples import Gathered, to_prometheus
from kptrace.model.metrics import MetricFamily, MetricSpec, Sample
from kptrace.model.signal import Source

SUCCESS = MetricSpec(
    "kptrace_collector_success",
    "gauge",
    "1 where the source could be read in this scrape, 0 where not.",
    ("collector",),
)
DURATION = MetricSpec(
    "kptrace_collector_duration_seconds",
    "gauge",
    "How long reading the source took in this scrape.",
    ("collector",),
)
FAILURES = MetricSpec(
    "kptrace_collector_failures_total",
    "counter",
    "Scrapes in which the source could not be read; the log says why.",
    ("collector",),
)
SERIES = MetricSpec("kptrace_series", "gauge", "Series of this scrape, all of them.")
FOLDED = MetricSpec(
    "kptrace_series_folded_total",
    "counter",
    "Series that were folded into ~other because of --max-series, by metric; counted at each scrape.",
    ("metric",),
)
SPECS = (SUCCESS, DURATION, FAILURES, SERIES, FOLDED)
#: How many series a node should have: beyond it a warning is logged, beyond `max_series` series are folded.
WARN_SERIES = 1500


class Exporter:
    """A collector for a prometheus_client registry of its own, and the rendering of it. Thread-safe."""

    def __init__(
        self,
        sources: Callable[[], Sequence[Source]],
        *,
        max_series: int = 4000,
        warn_series: int = WARN_SERIES,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Export what `sources` gives at each scrape; at most `max_series` series in all."""
        self._sources = sources
        self._max_series = max_series
        self._warn_series = warn_series
        self._clock = clock
        self._log = structlog.get_logger()
        self._lock = Lock()
        self._folder = Folder()
        self._folded: dict[str, int] = {}
        self._failures: dict[str, int] = {}
        self._failing: set[str] = set()
        self._many = False
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def render(self, accept: str, accept_encoding: str = "") -> tuple[bytes, dict[str, str]]:
        """One scrape: the body and its headers, in the format and encoding that the client accepts."""
        try:
            encoder, content_type = choose_encoder(accept)
        except (ValueError, TypeError):  # a version that is no number
            encoder, content_type = choose_encoder("")
        body = encoder(self._registry)
        headers = {"Content-Type": content_type, "Vary": "Accept, Accept-Encoding"}
        if accepts_gzip(accept_encoding):
            return gzip.compress(body, 1, mtime=0), {**headers, "Content-Encoding": "gzip"}
        return body, headers

    def describe(self) -> Iterable[Metric]:
        """All families that may come, without reading anything."""
        specs = [*SPECS, *(spec for source in self._sources() for spec in source.describe())]
        return [to_prometheus(MetricFamily(spec)) for spec in {spec.name: spec for spec in specs}.values()]

    def collect(self) -> Iterable[Metric]:
        """Read every source; one that raises is reported and the others go on."""
        gathered = Gathered(SPECS)
        durations: dict[str, float] = {}
        failed: set[str] = set()
        for source in self._sources():
            begin = self._clock()
            try:
                gathered.add(source.families())
            except Exception as error:  # noqa: BLE001  (logged and exposed: one source must not fail the scrape)
                failed.add(source.name)
                self._report(source.name, error)
            durations[source.name] = durations.get(source.name, 0.0) + self._clock() - begin
        with self._lock:
            shown = self._bounded(gathered.families(), durations, failed)
        return [to_prometheus(family) for family in shown]

    def _report(self, name: str, error: Exception) -> None:
        """Log the first of several failures with its traceback; all of them are counted."""
        with self._lock:
            first = name not in self._failing
            self._failing.add(name)
        if first:
            self._log.error("source_failed", source=name, error=str(error), exc_info=error)

    def _bounded(
        self, families: Sequence[MetricFamily], durations: dict[str, float], failed: set[str]
    ) -> list[MetricFamily]:
        """The scrape within its bound, with the exporter's own families. Holds the lock."""
        for name in durations:
            self._failures[name] = self._failures.get(name, 0) + (name in failed)
            if name in self._failing and name not in failed:
                self._failing.remove(name)
                self._log.info("source_recovered", source=name)
        success = [Sample((name,), float(name not in failed)) for name in durations]
        own = [
            MetricFamily(SUCCESS, success),
            MetricFamily(DURATION, [Sample((name,), seconds) for name, seconds in durations.items()]),
            MetricFamily(FAILURES, [Sample((name,), float(self._failures[name])) for name in durations]),
        ]
        room = self._max_series - sum(cost(family.samples) for family in own) - 1
        known = set(self._folded)
        shown, folded = self._folder.fold(families, room - len(known))
        while (
            not folded.keys() <= known
        ):  # each metric that is folded for the first time costs a series of FOLDED
            known |= folded.keys()
            shown, folded = self._folder.fold(families, room - len(known))
        for name, count in folded.items():
            self._folded[name] = self._folded.get(name, 0) + count
        totals = [Sample((name,), float(count)) for name, count in sorted(self._folded.items())]
        shown += [*own, MetricFamily(FOLDED, totals)]
        series = sum(cost(family.samples) for family in shown) + 1
        if series > self._warn_series and not self._many:
            self._log.warning(
                "many_series", series=series, folded=sorted(folded), max_series=self._max_series
            )
        self._many = series > self._warn_series
        return [*shown, MetricFamily(SERIES, [Sample((), float(series))])]


def accepts_gzip(accept_encoding: str) -> bool:
    """Whether an Accept-Encoding header allows gzip."""
    for each in accept_encoding.lower().split(","):
        coding, _, quality = each.replace(" ", "").partition(";q=")
        if coding == "gzip":
            return not quality or quality.strip("0.") != ""
    return False
