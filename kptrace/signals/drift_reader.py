# SPDX-License-Identifier: Apache-2.0
"""Reads kube-proxy's rules back now and then, in a thread of its own.

Reading asks the kernel thousands of small questions, so the thread rests most of the time, and while its find is compared.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final

import structlog

from kptrace.dataplanes.installed_services import Installed, read_installed
from kptrace.dataplanes.nftables.dump import open_channel
from kptrace.dataplanes.nftables.netlink import NetlinkError
from kptrace.dataplanes.nftables.service_dump import ServiceDump
from kptrace.kernel.netns import NetworkNamespace
from kptrace.model.errors import KernelError
from kptrace.model.netfilter import IpFamily

#: Reading may cost this share of a core.
COST_SHARE: Final = 0.005
#: After each so many steps of a reading, a rest.
STEPS: Final = 32
REST_SECONDS: Final = 0.005


class DriftReader:
    """`start`, `close` and `go_on` are for the loop's thread.

    Attributes:
        trouble: why the last reading failed; empty if it did not.
        interrupted: readings that failed.
    """

    def __init__(
        self,
        netns: NetworkNamespace,
        deliver: Callable[[Sequence[Installed], int], None],
        least_seconds: float,
        clock: Callable[[], int],
    ) -> None:
        """Nothing is read before `start`.

        Args:
            netns: where kube-proxy's rules are.
            deliver: called from this thread with what is installed, one for each family that has anything, and when
                reading began; the next reading waits for `go_on`.
            least_seconds: between two readings.
            clock: CLOCK_MONOTONIC, ns.
        """
        self._netns = netns
        self._deliver = deliver
        self._least = least_seconds
        self._clock = clock
        self._log = structlog.get_logger(signal="drift")
        self._closing = threading.Event()
        self._compared = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kptrace-drift", daemon=True)
        self.trouble = ""
        self.interrupted = 0

    def start(self) -> None:
        """Read now, and again for as long as the daemon lives."""
        self._thread.start()

    def close(self) -> None:
        """End the thread. Idempotent."""
        self._closing.set()
        self._compared.set()
        if self._thread.is_alive():
            self._thread.join()

    def go_on(self) -> None:
        """What was delivered has been compared."""
        self._compared.set()

    def _run(self) -> None:
        while not self._closing.is_set():
            begin, cost = self._clock(), time.thread_time()
            installed = self._read()
            cost = time.thread_time() - cost
            if installed is not None:
                # Cleared before looking, while `close` sets in the other order: neither can miss the other.
                self._compared.clear()
                if self._closing.is_set():
                    return
                self._deliver(installed, begin)
                self._compared.wait()
            self._closing.wait(max(self._least, cost / COST_SHARE))

    def _read(self) -> list[Installed] | None:
        """None where it could not be read."""
        try:
            with self._netns.enter():
                channel = open_channel()
        except (OSError, KernelError) as error:
            self._fail(f"no netlink socket in the watched namespace: {error}")
            return None
        found: list[Installed] = []
        with channel:
            try:
                for family in IpFamily:
                    found += self._gently(read_installed(ServiceDump(channel), family))
            except NetlinkError as error:
                self._fail(str(error))
                return None
        self.trouble = ""
        return found

    def _gently(self, steps: Iterator[Installed | None]) -> Iterable[Installed]:
        for number, found in enumerate(steps):
            if found is not None:
                yield found
            if number % STEPS == STEPS - 1 and self._closing.wait(REST_SECONDS):
                return

    def _fail(self, trouble: str) -> None:
        self.trouble = trouble
        self.interrupted += 1
        self._log.debug("drift_not_read", detail=trouble)
