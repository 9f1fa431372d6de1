# SPDX-License-Identifier: Apache-2.0
"""kube-proxy's own metrics beside ours: its mode and version, and by how much its syncs differ from what we saw."""

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Final, Protocol

import structlog

from kptrace.model.metrics import MetricFamily, MetricSpec, Sample
from kptrace.model.signal import MechanismState, State
from kptrace.signals.kube_proxy_page import EVERY, Page, Syncs, Window, parse
from kptrace.signals.sync_events import Sync
from kptrace.signals.writers import KUBE_PROXY

PERIOD_SECONDS: Final = 15.0
#: Our counting of a sync that is over comes up to a second after kube-proxy's own.
_JOIN_SECONDS: Final = 2.0

DIFFERENCE = MetricSpec(
    "kptrace_kube_proxy_sync_difference_seconds",
    "gauge",
    "kube-proxy's own mean sync duration less ours, over the last interval in which both counted the same number of"
    " syncs. Ours is from the first process that it starts to the exit of the last.",
    ("family",),
)
SYNCS = MetricSpec(
    "kptrace_kube_proxy_syncs_total",
    "counter",
    "Syncs of kube-proxy as it counts them itself (since its start; without change, and failed ones too) and as kptrace"
    " saw them (since kptrace's start).",
    ("family", "counted_by"),
)
SCRAPES = MetricSpec(
    "kptrace_kube_proxy_scrapes_total",
    "counter",
    "Looks at kube-proxy's own metrics, by outcome.",
    ("outcome",),
)
SPECS = (DIFFERENCE, SYNCS, SCRAPES)


class Timers(Protocol):
    """What it needs of the daemon's loop."""

    def call_soon_threadsafe(self, callback: Callable[[], None]) -> None:
        """Call on the loop's thread."""
        ...


class KubeProxySignal:
    """Implements `kptrace.model.signal.Source`. Everything but the fetching happens on the loop's thread."""

    name = "kube_proxy"

    def __init__(self, fetch: Callable[[str], str], loop: Timers, *, period: float = PERIOD_SECONDS) -> None:
        """Nothing is asked before `start`.

        Args:
            fetch: gives the text of a path of its metrics server; raises OSError if there is none.
            loop: whose thread owns the state.
            period: seconds between two looks.
        """
        self._fetch = fetch
        self._loop = loop
        self._period = period
        self._log = structlog.get_logger(signal=self.name)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kptrace-kube-proxy", daemon=True)
        self._page: Page | None = None
        self._trouble = ""
        self._ours: dict[str, Syncs] = {}
        self._windows: dict[str, Window] = {}
        self._scrapes = {"ok": 0, "failed": 0}
        self._published: tuple[MetricFamily, ...] = ()
        self._publish()

    def start(self) -> None:
        """Look now, and every `period` from then on."""
        self._thread.start()

    def close(self) -> None:
        """End. Idempotent."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(_JOIN_SECONDS)

    def synced(self, sync: Sync) -> None:
        """Count one of our own."""
        if sync.writer != KUBE_PROXY:
            return
        for family in (sync.family, EVERY):
            known = self._ours.get(family, Syncs())
            self._ours[family] = Syncs(known.count + 1, known.seconds + sync.duration_ns / 1e9)

    def proxy(self) -> tuple[str, str]:
        """Its mode and version; empty until they are known."""
        return (self._page.mode, self._page.version) if self._page else ("", "")

    def take(self, page: Page) -> None:
        """A look that succeeded."""
        self._scrapes["ok"] += 1
        self._page, self._trouble = page, ""
        for family, theirs in page.syncs.items():
            self._windows.setdefault(family, Window()).look(theirs, self._ours.get(family, Syncs()))
        self._publish()

    def fail(self, trouble: str) -> None:
        """A look that did not."""
        self._scrapes["failed"] += 1
        if not self._trouble:
            self._log.warning("kube_proxy_not_read", detail=trouble)
        self._trouble = trouble
        self._publish()

    def describe(self) -> Sequence[MetricSpec]:
        """See `Source`."""
        return SPECS

    def families(self) -> Iterable[MetricFamily]:
        """See `Source`."""
        return self._published

    def states(self) -> Sequence[MechanismState]:
        """See `Source`."""
        if self._trouble:
            return [MechanismState(self.name, "scrape", State.DEGRADED, "unreachable", self._trouble)]
        if self._page is None:
            return [MechanismState(self.name, "scrape", State.DEGRADED, "starting", "not read yet")]
        return [MechanismState(self.name, "scrape", State.ACTIVE)]

    def losses(self) -> Mapping[tuple[str, str], int]:
        """None: failed looks have a metric of their own."""
        return {}

    def status(self, *, names: bool) -> Mapping[str, object]:
        """Its mode and version."""
        mode, version = self.proxy()
        return {"kube-proxy": {"mode": mode, "version": version}}

    def _publish(self) -> None:
        counts = []
        for family, theirs in sorted((self._page.syncs if self._page else {}).items()):
            counts.append(Sample((family, "kube-proxy"), float(theirs.count)))
            counts.append(Sample((family, "kptrace"), float(self._ours.get(family, Syncs()).count)))
        differences = [
            Sample((family,), window.difference)
            for family, window in sorted(self._windows.items())
            if window.difference is not None
        ]
        scrapes = [Sample((outcome,), float(count)) for outcome, count in self._scrapes.items()]
        self._published = (
            MetricFamily(DIFFERENCE, differences),
            MetricFamily(SYNCS, counts),
            MetricFamily(SCRAPES, scrapes),
        )

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                page = parse(self._fetch("/metrics"), self._fetch("/proxyMode"))
            except OSError as error:
                self._loop.call_soon_threadsafe(partial(self.fail, str(error)))
            else:
                self._loop.call_soon_threadsafe(partial(self.take, page))
            self._stop.wait(self._period)
