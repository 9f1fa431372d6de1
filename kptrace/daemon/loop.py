# SPDX-License-Identifier: Apache-2.0
"""The daemon's one loop: readable descriptors, timers, and calls from other threads."""

import heapq
import itertools
import os
import selectors
import time
from collections import deque
from collections.abc import Callable

import structlog

Callback = Callable[[], None]


class Timer:
    """A call that is due once, until cancelled."""

    __slots__ = ("callback", "cancelled")

    def __init__(self, callback: Callback) -> None:
        """A pending call of `callback`."""
        self.callback = callback
        self.cancelled = False

    def cancel(self) -> None:
        """Forget the call. Idempotent."""
        self.cancelled = True


class Loop:
    """A single-threaded event loop.

    A callback that raises is logged under `failures` and counted; the others go on.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Make the loop; `clock` gives seconds that never go back."""
        self.now = clock
        self.failures = 0
        self._log = structlog.get_logger()
        self._selector = selectors.DefaultSelector()
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()
        self._posted: deque[Callback] = deque()
        self._running = False
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.add_reader(self._wake_read, self._drain)

    def add_reader(self, fd: int, callback: Callback) -> None:
        """Call `callback` whenever the descriptor is readable."""
        self._selector.register(fd, selectors.EVENT_READ, callback)

    def remove_reader(self, fd: int) -> None:
        """Stop watching the descriptor."""
        self._selector.unregister(fd)

    def call_later(self, seconds: float, callback: Callback) -> Timer:
        """Call once, this many seconds from now."""
        timer = Timer(callback)
        heapq.heappush(self._timers, (self.now() + seconds, next(self._order), timer))
        return timer

    def call_every(self, seconds: float, callback: Callback) -> Timer:
        """Call again and again, this many seconds after the end of the last call."""
        handle = Timer(callback)

        def again() -> None:
            if handle.cancelled:
                return
            try:
                callback()
            finally:
                self.call_later(seconds, again)

        self.call_later(seconds, again)
        return handle

    def call_soon_threadsafe(self, callback: Callback) -> None:
        """Call from the loop's thread as soon as it is free. The only method for other threads and signal handlers."""
        self._posted.append(callback)
        try:
            os.write(self._wake_write, b"\0")
        except BlockingIOError:
            return  # the pipe is full of wake-ups already

    def run(self) -> None:
        """Run until `stop`."""
        self._running = True
        while self._running:
            self.run_once(None)

    def run_once(self, longest: float | None) -> None:
        """Wait at most `longest` seconds for something to do (None: for ever), and do it."""
        timeout = longest
        if self._timers:
            due_in = max(0.0, self._timers[0][0] - self.now())
            timeout = due_in if longest is None else min(longest, due_in)
        for key, _events in self._selector.select(timeout):
            self._call(key.data)
        while self._timers and self._timers[0][0] <= self.now():
            _due, _order, timer = heapq.heappop(self._timers)
            if not timer.cancelled:
                self._call(timer.callback)
        for _ in range(len(self._posted)):
            self._call(self._posted.popleft())

    def stop(self) -> None:
        """End `run` after the present round."""
        self._running = False

    def close(self) -> None:
        """Give the descriptors back."""
        self._selector.close()
        os.close(self._wake_read)
        os.close(self._wake_write)

    def _drain(self) -> None:
        os.read(self._wake_read, 4096)

    def _call(self, callback: Callback) -> None:
        try:
            callback()
        except Exception:  # noqa: BLE001  (logged with its traceback and counted: one bug must not end the daemon)
            self.failures += 1
            self._log.exception("callback_failed", callback=getattr(callback, "__qualname__", repr(callback)))
