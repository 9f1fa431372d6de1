# SPDX-License-Identifier: Apache-2.0
"""The lookup signal on a test's namespace, with its clockwork in the test's hands, and what nft itself counted."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from kptrace.dataplanes.installed import InstalledChains
from kptrace.experiments.netns import Namespace
from kptrace.kernel.bytecode import Bytecode
from kptrace.kernel.netns import NetworkNamespace
from kptrace.model.metrics import HistogramSample
from kptrace.signals.lookup import LookupSignal, Options
from kptrace.signals.lookup_kernel import LookupKernel
from kptrace.signals.sampling import Sampling


@dataclass
class ManualTimers:
    """Timers that only the test runs."""

    calls: list[Callable[[], None]] = field(default_factory=list)

    def call_every(self, _seconds: float, callback: Callable[[], None]) -> None:
        """Keep the callback."""
        self.calls.append(callback)

    def call_soon_threadsafe(self, callback: Callable[[], None]) -> None:
        """Call at once."""
        callback()


class LookupBench:
    """One running lookup signal and its counts by label."""

    def __init__(self, bytecode: Bytecode, namespace: Namespace, **options: Any) -> None:
        self._netns = netns = NetworkNamespace(namespace.path)
        self._chains = InstalledChains(netns)
        self.timers = ManualTimers()
        self.kernel = LookupKernel(bytecode)
        self.signal = LookupSignal(
            self.kernel,
            netns,
            self._chains,
            self.timers,
            Options(**{"sampling": Sampling(1, 1), **options}),
        )
        self.signal.start()

    def samples(self) -> list[dict[str, Any]]:
        """Every lookup histogram as its labels, `count` and `mean_ns`."""
        return self._read("kptrace_lookup_duration_seconds")

    def services(self) -> dict[str, int]:
        """Samples by service name."""
        return {
            row["service_name"]: row["count"] for row in self._read("kptrace_service_lookup_duration_seconds")
        }

    def count(self, **labels: str) -> int:
        """Samples whose labels have these values."""
        return sum(
            row["count"]
            for row in self.samples()
            if all(row[name] == value for name, value in labels.items())
        )

    def unpaired(self) -> dict[str, int]:
        """Losses by reason, over all hooks."""
        totals: dict[str, int] = {}
        for family in self.signal.families():
            if family.spec.name == "kptrace_lookup_unpaired_total":
                for sample in family.samples:
                    reason = sample.labels[1]
                    totals[reason] = totals.get(reason, 0) + int(sample.value)
        return totals

    def _read(self, name: str) -> list[dict[str, Any]]:
        rows = []
        for family in self.signal.families():
            if family.spec.name == name:
                for sample in family.samples:
                    assert isinstance(sample, HistogramSample)
                    row: dict[str, Any] = dict(zip(family.spec.labels, sample.labels, strict=True))
                    rows.append(
                        {**row, "count": sample.count, "mean_ns": sample.sum / max(1, sample.count) * 1e9}
                    )
        return rows

    def close(self) -> None:
        """Detach everything."""
        self.signal.close()
        self._chains.close()
        self._netns.close()


def nft(namespace: Namespace, text: str) -> None:
    """Apply an nft script."""
    namespace.run(["nft", "-f", "-"], stdin=text)


def nft_counter(namespace: Namespace, chain: str, table: str = "t", family: str = "ip") -> int:
    """Packets that the first counter of a chain counted: the oracle."""
    listing = json.loads(namespace.run(["nft", "-j", "list", "chain", family, table, chain]))
    for item in listing["nftables"]:
        for expression in item.get("rule", {}).get("expr", []):
            if "counter" in expression:
                return int(expression["counter"]["packets"])
    raise AssertionError(f"{table} {chain} has no counter")
