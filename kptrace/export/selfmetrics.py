# SPDX-License-Identifier: Apache-2.0
"""What kptrace says of itself: build, node, mechanism states, losses, its own process."""

import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from kptrace import __version__
from kptrace.model.metrics import MetricFamily, MetricSpec, Sample
from kptrace.model.signal import MechanismState

BUILD = MetricSpec("kptrace_build_info", "info", "Version of kptrace and of Python.", ("version", "python"))
NODE = MetricSpec(
    "kptrace_node_info",
    "info",
    "Kernel release and machine of this node; kube-proxy's mode and version as it says itself, empty where it is not"
    " asked (--kube-proxy-metrics).",
    ("kernel", "machine", "proxy_mode", "proxy_version"),
)
STATE = MetricSpec(
    "kptrace_signal_state",
    "gauge",
    "1 for the present state of each mechanism of each signal: active, degraded, unavailable or off; the reason is a "
    "code, /status has the detail.",
    ("signal", "mechanism", "state", "reason"),
)
LOST = MetricSpec(
    "kptrace_events_lost_total",
    "counter",
    "Events that were lost, by signal and reason.",
    ("signal", "reason"),
)
CPU = MetricSpec("process_cpu_seconds_total", "counter", "User and system CPU time of the daemon.")
MEMORY = MetricSpec("process_resident_memory_bytes", "gauge", "Resident memory of the daemon.")
FDS = MetricSpec("process_open_fds", "gauge", "Open file descriptors of the daemon.")
START = MetricSpec("process_start_time_seconds", "gauge", "When the daemon started, seconds since the epoch.")
SPECS = (BUILD, NODE, STATE, LOST, CPU, MEMORY, FDS, START)


class SelfMetrics:
    """Implements `kptrace.model.signal.Source`."""

    name = "self"

    def __init__(
        self,
        states: Callable[[], Iterable[MechanismState]],
        losses: Callable[[], Mapping[tuple[str, str], int]],
        proc: Path = Path("/proc/self"),
        proxy: Callable[[], tuple[str, str]] = lambda: ("", ""),
    ) -> None:
        """`states`, `losses` and `proxy` (mode and version) are asked at each scrape; `proc` is our folder in procfs."""
        self._states = states
        self._losses = losses
        self._proxy = proxy
        self._proc = proc
        self._boot = _boot_time(proc.parent / "stat")

    def describe(self) -> Sequence[MetricSpec]:
        """See `Source`."""
        return SPECS

    def states(self) -> Sequence[MechanismState]:
        """See `Source`."""
        return ()

    def families(self) -> Iterable[MetricFamily]:
        """See `Source`."""
        yield MetricFamily(BUILD, [Sample((__version__, platform.python_version()), 1.0)])
        yield MetricFamily(NODE, [Sample((platform.release(), platform.machine(), *self._proxy()), 1.0)])
        rows = sorted({(s.signal, s.mechanism, s.state.value, s.reason) for s in self._states()})
        yield MetricFamily(STATE, [Sample(row, 1.0) for row in rows])
        yield MetricFamily(LOST, [Sample(key, float(count)) for key, count in sorted(self._losses().items())])
        yield from self._process()

    def _process(self) -> Iterable[MetricFamily]:
        # The command name may hold spaces and parentheses: fields count from behind its end.
        fields = (self._proc / "stat").read_text().rpartition(")")[2].split()
        ticks = os.sysconf("SC_CLK_TCK")
        yield MetricFamily(CPU, [Sample((), (int(fields[11]) + int(fields[12])) / ticks)])
        yield MetricFamily(MEMORY, [Sample((), float(int(fields[21]) * os.sysconf("SC_PAGE_SIZE")))])
        yield MetricFamily(FDS, [Sample((), float(sum(1 for _ in (self._proc / "fd").iterdir())))])
        yield MetricFamily(START, [Sample((), self._boot + int(fields[19]) / ticks)])


def _boot_time(stat: Path) -> float:
    return next(float(line.split()[1]) for line in stat.read_text().splitlines() if line.startswith("btime "))
