# SPDX-License-Identifier: Apache-2.0
"""Looks for Cilium in the kernel now and then, and reads its service maps when asked to, in a thread of its own."""

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import structlog

from kptrace.dataplanes.cilium.detect import Datapath, Detector
from kptrace.dataplanes.cilium.layouts import Role
from kptrace.dataplanes.cilium.service_state import FAMILY_OF, ServiceState
from kptrace.kernel.foreign_map import ForeignMap
from kptrace.kernel.host import Host
from kptrace.kernel.objects import open_map
from kptrace.model.errors import KernelError

#: Between two looks: programs are replaced at any time where Cilium is, and Cilium comes seldom where it is not.
PRESENT_SECONDS: Final = 2.0
ABSENT_SECONDS: Final = 10.0
#: Entries of one map: more than any has.
MOST_ENTRIES: Final = 1 << 21


@dataclass(frozen=True, slots=True)
class Reading:
    """The service maps, read while they may have been written to.

    Attributes:
        state: what was in them.
        begin_ns: when reading began, CLOCK_MONOTONIC: writes from then on may be in it, or not.
    """

    state: ServiceState
    begin_ns: int


class DatapathWatch:
    """`start`, `close` and `read` are for one thread.

    Attributes:
        trouble: why the last look or reading failed; empty if it did not.
        failed: how many did.
    """

    def __init__(
        self,
        host: Host,
        seen: Callable[[Datapath], None],
        loaded: Callable[[Reading], None],
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """Nothing is looked for before `start`.

        Args:
            host: where the BPF file system and procfs are.
            seen: called from this thread with what is there when that has changed.
            loaded: called from this thread with what was read.
            clock: CLOCK_MONOTONIC, ns.
        """
        self._detector = Detector(host)
        self._host = host
        self._tell_seen = seen
        self._tell_loaded = loaded
        self._clock = clock
        self._log = structlog.get_logger(signal="datapath")
        self._closing = threading.Event()
        self._wake = threading.Event()
        self._wanted = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kptrace-datapath", daemon=True)
        self._last: Datapath | None = None
        self.trouble = ""
        self.failed = 0

    def start(self) -> None:
        """Look now, and again for as long as the daemon lives."""
        self._thread.start()

    def close(self) -> None:
        """End the thread. Idempotent."""
        self._closing.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()

    def read(self) -> None:
        """Read the service maps as soon as may be."""
        self._wanted.set()
        self._wake.set()

    def _run(self) -> None:
        while not self._closing.is_set():
            self._wake.clear()
            try:
                self._look()
                if self._wanted.is_set() and self._last is not None:
                    self._wanted.clear()
                    self._read(self._last)
            except (KernelError, OSError, ValueError) as error:
                self.trouble = str(error)
                self.failed += 1
                self._log.debug("look_failed", detail=self.trouble)
            else:
                self.trouble = ""
            present = self._last is not None and self._last.present
            self._wake.wait(PRESENT_SECONDS if present else ABSENT_SECONDS)

    def _look(self) -> None:
        seen = self._detector.look()
        if seen != self._last:
            self._last = seen
            self._tell_seen(seen)

    def _read(self, seen: Datapath) -> None:
        state = ServiceState(seen.layouts)
        begin = self._clock()
        for role in FAMILY_OF:
            self._load(state, seen, role)
        self._tell_loaded(Reading(state, begin))

    def _load(self, state: ServiceState, seen: Datapath, role: Role) -> None:
        found = seen.maps.get(role)
        fd = open_map(found[0].info.id) if found else None
        if found is None or fd is None:
            return
        try:
            map_ = ForeignMap(fd, found[0].info, self._host.possible_cpus())
        except BaseException:
            os.close(fd)
            raise
        try:
            state.load(role, map_.read(MOST_ENTRIES))
        finally:
            map_.close()
