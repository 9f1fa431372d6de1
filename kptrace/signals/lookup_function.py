# SPDX-License-Identifier: Apache-2.0
"""The lookup signal by the functions that walk the rules: fentry and fexit, or kprobe and kretprobe.

All network namespaces at once, each chain by its own name. The verdict is what the function returns: `drop` for NF_DROP,
`accept` for everything else, so also for a packet that a rule took over or queued: its walk ends there all the same.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Final

import structlog

from kptrace.kernel.bytecode import Bytecode
from kptrace.kernel.host import Host
from kptrace.kernel.netns import NetworkNamespace
from kptrace.model.metrics import MetricFamily, MetricSpec
from kptrace.model.signal import MechanismState
from kptrace.signals.lookup import Options, Timers
from kptrace.signals.lookup_cells import LOOKUP_SPEC, UNPAIRED_SPEC
from kptrace.signals.lookup_function_families import (
    SPECS,
    Published,
    lookup_samples,
    missed,
    own_families,
    unpaired_samples,
)
from kptrace.signals.lookup_function_follow import FunctionFollower
from kptrace.signals.lookup_function_kernel import FunctionKernel, Mechanism
from kptrace.signals.lookup_function_places import bounded
from kptrace.signals.lookup_govern import TRACING_PAIR, Costs, OverheadGovernor

#: Guest instructions (docs/overhead.md), two a nanosecond as the bracket's take where both were measured.
COSTS: Final[Mapping[Mechanism, Costs]] = MappingProxyType(
    {"fentry": TRACING_PAIR, "kprobe": Costs(1180.0, 590.0)}
)
FOLLOW_SECONDS = 0.5
GOVERN_SECONDS = 1.0


class FunctionLookup:
    """Implements `kptrace.model.signal.Source`."""

    name = "lookup"

    def __init__(
        self,
        code: Bytecode,
        mechanism: Mechanism,
        netns: NetworkNamespace,
        host: Host,
        timers: Timers,
        options: Options,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make the maps; nothing is attached before `start`.

        Args:
            code: of `lookup_function_kernel.REQUESTS[mechanism]`.
            mechanism: fentry or kprobe.
            netns: whose look-ups are the host's; those of all other namespaces are pods'.
            host: where sysfs is.
            timers: the daemon's.
            options: as the user set them.
            clock: seconds.

        Raises:
            KernelError: the maps were refused.
        """
        self._netns = netns
        self._timers = timers
        self._options = options
        self._log = structlog.get_logger(signal=self.name)
        self._kernel = FunctionKernel(code, mechanism, netns.inode, host)
        self._follower = FunctionFollower(self._kernel, host, lambda: timers.call_soon_threadsafe(self.tick))
        self._governor = OverheadGovernor(options.sampling, options.budget, COSTS[mechanism], clock)
        self._closed = False
        self._published = Published(self._follower.state)

    def start(self) -> None:
        """Attach to the functions that are there, and keep up with their modules from then on.

        Raises:
            UnsupportedError: functions are there, and none can be attached to.
        """
        self._follower.start()
        self._arm()
        self._publish()
        self._timers.call_every(FOLLOW_SECONDS, self.tick)
        self._timers.call_every(GOVERN_SECONDS, self._govern)

    def tick(self) -> None:
        """Follow the modules, and the watched namespace's end."""
        if self._closed:
            return
        if self._netns.ended():
            self._closed = True
            self._follower.end("namespace_ended", "the watched network namespace is gone")
            self._netns.close()
            self._log.warning("namespace_ended", path=str(self._netns.path))
        else:
            self._follower.tick(attached=self._governor.attached)
        self._publish()

    def _arm(self) -> None:
        self._kernel.configure(armed=True, sampling=self._governor.sampling())

    def _govern(self) -> None:
        if self._closed:
            return
        changed = self._governor.govern(self._kernel.opened(), self._log)
        if changed.sampling:
            self._arm()
        if changed.attached:
            self.tick()
        self._publish()

    def _publish(self) -> None:
        attached = self._governor.attached and bool(self._follower.attached)
        self._published = Published(
            self._follower.state,
            self._governor.ratios() if attached else (0.0, 0.0),
            self._governor.overhead,
            self._options.budget,
        )

    def describe(self) -> Sequence[MetricSpec]:
        """See `Source`."""
        return SPECS

    def states(self) -> Sequence[MechanismState]:
        """See `Source`."""
        return [self._published.state]

    def status(self, *, names: bool) -> Mapping[str, object]:
        """What /status shows of it."""
        first, rest = self._published.ratios
        return {
            "functions": [function.name for function in self._follower.attached],
            "sampling": {"first packets": first, "the rest": rest, "overhead": self._published.overhead},
        }

    def losses(self) -> Mapping[tuple[str, str], int]:
        """Chains that were counted as `~other`; unpaired packets have a metric of their own."""
        return {("lookup", "chain_without_number"): self._kernel.folded()}

    def families(self) -> Iterable[MetricFamily]:
        """See `Source`. Reads the kernel's memory and what was last published."""
        kernel = self._kernel
        places = bounded(kernel.places())
        samples = lookup_samples(kernel.memory("cells"), places, kernel.mechanism)
        yield MetricFamily(LOOKUP_SPEC, list(samples))
        misses = kernel.misses()
        # A return that no program saw is in the kernel's own counts, but for kprobes before v6.7.
        told = kernel.mechanism == "fentry" or misses.kprobe is not None
        unpaired = unpaired_samples(kernel.memory("counts"), places, missed(misses), returns_told=told)
        yield MetricFamily(UNPAIRED_SPEC, unpaired)
        yield from own_families(self._published)

    def close(self) -> None:
        """Detach. Idempotent."""
        self._closed = True
        self._follower.close()
        self._kernel.close()
