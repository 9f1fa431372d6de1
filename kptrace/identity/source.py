# SPDX-License-Identifier: Apache-2.0
"""The identity of addresses as the daemon sees it: one snapshot, whom to tell of a new one, metrics and states."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

from kptrace.identity.client import KubernetesApi
from kptrace.identity.differences import Difference, Differences, Programmed
from kptrace.identity.feed import REJECTED, Feed, Message, Rejected, Trouble
from kptrace.identity.files import FileFeed
from kptrace.identity.health import SIGNAL, Health
from kptrace.identity.records import Name
from kptrace.identity.resources import Level, resources
from kptrace.identity.store import Store
from kptrace.identity.watchfeed import WatchFeed
from kptrace.model.errors import UsageError
from kptrace.model.identity import Snapshot
from kptrace.model.metrics import MetricFamily, MetricSpec, Sample
from kptrace.model.signal import MechanismState, State

OBJECTS = MetricSpec(
    "kptrace_identity_objects",
    "gauge",
    "Kubernetes objects that names are taken from, by kind: those that were listed or watched last.",
    ("kind",),
)
LAST_EVENT = MetricSpec(
    "kptrace_identity_last_event_timestamp_seconds",
    "gauge",
    "When each watch (or the file) last said that objects exist, changed or stayed: a list, an event, a bookmark about "
    "every minute. Seconds since the epoch; without a sample nothing was heard yet.",
    ("scope",),
)
ERRORS = MetricSpec(
    "kptrace_identity_errors_total",
    "counter",
    "Failures to hear or understand the source of names (file or api), by reason. The names known before stay.",
    ("source", "reason"),
)

Subscriber = Callable[[Snapshot], None]


@dataclass(frozen=True, slots=True)
class IdentitySettings:
    """Where names come from.

    Attributes:
        level: how much to watch; `none` for no names. A file is always used as a whole.
        file: read this manifest instead of watching the API server.
        kubeconfig: None for the cluster's own configuration in a pod, else the client's default.
        node: this node's name; needed by `full`.
        endpoint_slices: watch EndpointSlices too.
        start_delay: longest random wait before the first request to the API server, seconds.
    """

    level: Level = Level.SERVICES
    file: Path | None = None
    kubeconfig: Path | None = None
    node: str = ""
    endpoint_slices: bool = False
    start_delay: float = 60.0


class Identity:
    """The store's only owner. `poll` and `subscribe` belong to the owner's thread, everything else to any."""

    name = "identity"

    def __init__(
        self,
        feed: Feed | None,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        node: str = "",
    ) -> None:
        """Take names from `feed`; None for no names at all.

        The clocks give monotonic and epoch seconds; `node` is this node's name.
        """
        self._feed = feed
        self._clock = clock
        self._wall = wall
        self._log = structlog.get_logger()
        self._store = Store()
        self._differences = Differences(self._store, feed.scopes if feed else (), node)
        self._snapshot = self._store.snapshot()
        self._subscribers: list[Subscriber] = []
        self._errors: Counter[str] = Counter(dict.fromkeys((*feed.reasons, REJECTED), 0) if feed else {})
        self._last_event: dict[str, float] = {}
        self._health: dict[str, Health] = {scope: Health(scope) for scope in (feed.scopes if feed else ())}
        self._families = self._collect()

    @classmethod
    def open(cls, settings: IdentitySettings, *, clock: Callable[[], float] = time.monotonic) -> "Identity":
        """Make the feed that the settings ask for; nothing is read or asked yet.

        Raises:
            UsageError: the settings contradict each other, or the kubeconfig is no file.
        """
        if settings.file is not None:
            return cls(FileFeed(settings.file, clock=clock), clock=clock)
        wanted = resources(settings.level, node=settings.node, endpoint_slices=settings.endpoint_slices)
        if not wanted:
            return cls(None, clock=clock)
        if settings.kubeconfig is not None and not settings.kubeconfig.is_file():
            raise UsageError(f"no kubeconfig at {settings.kubeconfig}", remedy="see --kubeconfig")
        api = KubernetesApi(settings.kubeconfig)
        feed = WatchFeed(api, wanted, start_delay=settings.start_delay, clock=clock)
        return cls(feed, clock=clock, node=settings.node)

    @property
    def ready(self) -> bool:
        """Whether everything that is to be known was known once."""
        return all(health.listed for health in self._health.values())

    def start(self) -> None:
        """Begin. Names from a file are known when this returns.

        Raises:
            ManifestError: the file cannot be read or understood.
        """
        if self._feed is not None:
            self._feed.start()
            self.poll()

    def close(self) -> None:
        """End threads and connections; the last snapshot stays. Idempotent."""
        if self._feed is not None:
            self._feed.close()

    def snapshot(self) -> Snapshot:
        """What is known now."""
        return self._snapshot

    def subscribe(self, callback: Subscriber) -> None:
        """Call with each new snapshot, on the owner's thread; not with the present one."""
        self._subscribers.append(callback)

    def follow(self, listener: Callable[[Difference], None]) -> None:
        """Call with what each event changes of what kube-proxy is to program on this node, on the owner's thread."""

        def guarded(difference: Difference) -> None:
            try:
                listener(difference)
            except Exception:  # noqa: BLE001 - its bug must not keep the names from the others
                self._log.exception("identity_follower_failed")

        self._differences.listen(guarded)

    @property
    def followed(self) -> bool:
        """Whether all that it takes to say what is to be programmed is watched, and was listed."""
        return self._differences.ready

    def programmed(self) -> tuple[Name, ...]:
        """The Services that there are; on the owner's thread."""
        return self._differences.names()

    def wanted(self, name: Name) -> Programmed:
        """What kube-proxy is to program of a Service on this node; on the owner's thread."""
        return self._differences.wanted(name)

    def poll(self) -> None:
        """Take what arrived, publish a new snapshot if anything changed, and tell the subscribers."""
        messages = self._feed.drain() if self._feed is not None else ()
        if not messages:
            return
        health = dict(self._health)
        for message in messages:
            self._take(message)
            health[message.scope] = health[message.scope].after(message)
        self._health = health
        before, self._snapshot = self._snapshot, self._store.snapshot()
        self._families = self._collect()
        if self._snapshot is not before:
            for subscriber in self._subscribers:
                self._tell(subscriber)

    def describe(self) -> Sequence[MetricSpec]:
        """All families that it can ever yield."""
        return OBJECTS, LAST_EVENT, ERRORS

    def families(self) -> Iterable[MetricFamily]:
        """The values of the last poll."""
        return self._families

    def states(self) -> Sequence[MechanismState]:
        """One row for a file, or one for each watch."""
        if not self._health:
            return (
                MechanismState(SIGNAL, "none", State.OFF, "disabled", "no source of names was asked for"),
            )
        now = self._clock()
        return tuple(health.state(now) for health in self._health.values())

    def _take(self, message: Message) -> None:
        self._differences.apply(message)
        match message:
            case Trouble():
                self._errors[message.reason] += 1
                what = message.message or message.detail
                self._log.warning("identity_trouble", scope=message.scope, reason=message.reason, detail=what)
            case Rejected():
                self._errors[REJECTED] += 1
                self._log.warning("identity_object_rejected", scope=message.scope, detail=message.detail)
        if not isinstance(message, Trouble):
            # Messages carry monotonic time; what is exposed is the clock on the wall at that moment.
            self._last_event[message.scope] = self._wall() - max(0.0, self._clock() - message.at)

    def _tell(self, subscriber: Subscriber) -> None:
        try:
            subscriber(self._snapshot)
        except Exception:  # noqa: BLE001 - one subscriber's bug must not keep the names from the others
            self._log.exception("identity_subscriber_failed", revision=self._snapshot.revision)

    def _collect(self) -> tuple[MetricFamily, ...]:
        source = self._feed.source if self._feed is not None else ""
        objects = tuple(
            Sample((kind,), float(count)) for kind, count in self._store.counts().items() if source
        )
        last = tuple(Sample((scope,), at) for scope, at in self._last_event.items())
        errors = tuple(Sample((source, reason), float(count)) for reason, count in self._errors.items())
        return MetricFamily(OBJECTS, objects), MetricFamily(LAST_EVENT, last), MetricFamily(ERRORS, errors)
