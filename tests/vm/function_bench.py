# SPDX-License-Identifier: Apache-2.0
"""Look-ups by function with their clockwork in the test's hands; namespaces, rules and packets are the native tests'."""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kptrace.experiments.netns import Namespace
from kptrace.kernel.compile import Compiler
from kptrace.kernel.host import Host
from kptrace.kernel.memlock import raise_memlock
from kptrace.kernel.netns import NetworkNamespace
from kptrace.model.metrics import HistogramSample
from kptrace.signals.lookup import Options
from kptrace.signals.lookup_function import FunctionLookup
from kptrace.signals.lookup_function_kernel import REQUESTS, Mechanism
from kptrace.signals.sampling import Sampling
from tests.native.lookup_bench import ManualTimers

# Emulated time.
_LONGEST_SECONDS = 120.0


class Ticked(ManualTimers):
    """Timers of a signal that the test ticks by itself, from its own thread."""

    def call_soon_threadsafe(self, _callback: Callable[[], None]) -> None:
        """Leave it to the test."""


class FunctionBench:
    """One running mechanism and its counts by label."""

    def __init__(
        self, mechanism: Mechanism, namespace: Namespace, sampling: Sampling = Sampling(1, 1)
    ) -> None:
        raise_memlock()
        self._netns = NetworkNamespace(namespace.path)
        self.timers = Ticked()
        code = Compiler(Path("/sys/kernel/btf/vmlinux"), Path("/var/cache/kptrace")).build(
            REQUESTS[mechanism]
        )
        options = Options(sampling)
        self.signal = FunctionLookup(code, mechanism, self._netns, Host(), self.timers, options)
        self.signal.start()

    def rows(self) -> list[dict[str, Any]]:
        """Every lookup histogram as its labels and `count`."""
        rows = []
        for family in self.signal.families():
            if family.spec.name == "kptrace_lookup_duration_seconds":
                for sample in family.samples:
                    assert isinstance(sample, HistogramSample)
                    row: dict[str, Any] = dict(zip(family.spec.labels, sample.labels, strict=True))
                    rows.append({**row, "count": sample.count, "sum": sample.sum})
        return rows

    def count(self, **labels: str) -> int:
        """Samples whose labels have these values."""
        return sum(
            row["count"] for row in self.rows() if all(row[name] == value for name, value in labels.items())
        )

    def unpaired(self) -> dict[str, int]:
        """Losses by reason, over all hooks."""
        totals: dict[str, int] = {}
        for family in self.signal.families():
            if family.spec.name == "kptrace_lookup_unpaired_total":
                for sample in family.samples:
                    assert not isinstance(sample, HistogramSample)
                    reason = sample.labels[1]
                    totals[reason] = totals.get(reason, 0) + int(sample.value)
        return totals

    def state(self) -> Any:
        """The mechanism's row."""
        (row,) = self.signal.states()
        return row

    def follow_until(self, condition: Callable[[], bool]) -> None:
        """Tick until the condition holds."""
        ends = time.monotonic() + _LONGEST_SECONDS
        while not condition():
            assert time.monotonic() < ends, self.state()
            time.sleep(0.1)
            self.signal.tick()

    def close(self) -> None:
        """Detach everything."""
        self.signal.close()
        self._netns.close()


def loaded(module: str) -> bool:
    """Whether a module is loaded."""
    return Path(f"/sys/module/{module}/initstate").exists()


def modprobe(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """Load or unload modules."""
    return subprocess.run(["modprobe", *arguments], capture_output=True, text=True, check=False)
