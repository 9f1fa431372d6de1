# SPDX-License-Identifier: Apache-2.0
"""The watches' threads: one for each resource, and one bounded queue to the owner of the store."""

import queue
import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import structlog

from kptrace.identity.api import Api, ApiError
from kptrace.identity.feed import Message, Trouble
from kptrace.identity.resources import Resource
from kptrace.identity.watch import Tools, keep_watching

#: Messages that wait for the owner; a full queue makes the watches wait, and then the API server's.
QUEUE_LENGTH = 4096
_PUT_SECONDS = 0.2
_JOIN_SECONDS = 2.0


class ClosableApi(Api, Protocol):
    """An API server whose pending requests can be ended."""

    def close(self) -> None:
        """End all pending requests."""
        ...


class WatchFeed:
    """Objects from the API server. An unreachable server is a state, never an error of `start`."""

    source = "api"
    reasons = ApiError.reasons

    def __init__(
        self,
        api: ClosableApi,
        resources: Sequence[Resource],
        *,
        start_delay: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
        pause: Callable[[float], bool] | None = None,
    ) -> None:
        """Watch these resources.

        Args:
            api: the server.
            resources: what to watch; each gets a thread.
            start_delay: the first requests come after a random part of these seconds: a DaemonSet's roll-out starts on
                all nodes at once.
            clock: monotonic seconds.
            rng: for all jitter.
            pause: waits seconds on a watch's thread, false to end it; by default until `close`.
        """
        self.scopes = tuple(resource.scope for resource in resources)
        self._api = api
        self._rng = rng or random.Random()  # noqa: S311 - jitter, no secret
        self._stop = threading.Event()
        self._start_delay = start_delay
        self._queue: queue.Queue[Message] = queue.Queue(QUEUE_LENGTH)
        self._tools = Tools(clock, pause or (lambda seconds: not self._stop.wait(seconds)), self._rng)
        self._threads = [
            threading.Thread(
                target=self._run,
                args=(resource,),
                name=f"kptrace-{resource.scope}",
                daemon=True,  # a read that cannot be interrupted must not keep the process
            )
            for resource in resources
        ]

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    def drain(self) -> Sequence[Message]:
        """What arrived since the last call, at most a queue's length."""
        messages: list[Message] = []
        while len(messages) < QUEUE_LENGTH:
            try:
                messages.append(self._queue.get_nowait())
            except queue.Empty:
                break
        return messages

    def close(self) -> None:
        """End the watches; waits for their threads a moment only."""
        self._stop.set()
        self._api.close()
        deadline = time.monotonic() + _JOIN_SECONDS
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(0.0, deadline - time.monotonic()))

    def _run(self, resource: Resource) -> None:
        going = self._tools.pause(self._rng.uniform(0, self._start_delay))
        while going and not self._stop.is_set():
            try:
                for message in keep_watching(self._api, resource, self._tools):
                    if not self._put(message):
                        return
                return
            except Exception as error:  # noqa: BLE001 - as said below
                # A bug must not silence the names for ever: it is logged, counted, and the watch begins anew.
                structlog.get_logger().exception("identity_watch_failed", scope=resource.scope)
                self._put(Trouble(resource.scope, self._tools.clock(), "internal", type(error).__name__))
                going = self._tools.pause(60.0)

    def _put(self, message: Message) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(message, timeout=_PUT_SECONDS)
            except queue.Full:
                continue
            return True
        return False
