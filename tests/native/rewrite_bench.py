# SPDX-License-Identifier: Apache-2.0
"""The rewrite signal on a test's namespace, on a loop that runs when the test says so."""

import time
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from kptrace.daemon.loop import Loop
from kptrace.experiments.netns import Namespace
from kptrace.kernel.bytecode import Bytecode
from kptrace.kernel.compile import Compiler
from kptrace.kernel.netns import NetworkNamespace
from kptrace.model.metrics import HistogramSample
from kptrace.model.rewrite import Rewrite
from kptrace.signals.process_kernel import REQUEST
from kptrace.signals.process_watch import ProcessWatch
from kptrace.signals.rewrite import Options, RewriteSignal

PATIENCE_SECONDS = 30.0


@cache
def process_bytecode() -> Bytecode:
    """The programs that follow processes."""
    return Compiler(Path("/sys/kernel/btf/vmlinux"), None).build(REQUEST)


class RewriteBench:
    """One running rewrite signal; `commits` has what it told of."""

    def __init__(self, bytecode: Bytecode, namespace: Namespace, **options: Any) -> None:
        self.netns = NetworkNamespace(namespace.path)
        self.loop = Loop()
        self.commits: list[Rewrite] = []
        self.processes = ProcessWatch(process_bytecode())
        self.processes.start()
        self.signal = RewriteSignal(
            bytecode,
            self.netns,
            self.loop,
            on_commit=self.commits.append,
            options=Options(**{"least_dump_seconds": 0.0, **options}),
            processes=self.processes.consume,
        )
        self.signal.start()
        self.until(lambda: self.value("kptrace_ruleset_objects_exact") == 1)

    def settle(self) -> None:
        """Take in everything that happened so far, and compare the generation once."""
        self.signal.tick()

    def until(self, condition: Callable[[], bool]) -> None:
        """Run the loop until something is so."""
        end = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            assert time.monotonic() < end, "it never came"
            self.loop.run_once(0.05)

    def rows(self, name: str) -> list[tuple[dict[str, str], float]]:
        """Every sample of a family: its labels and its value, or count."""
        found = []
        for family in self.signal.families():
            if family.spec.name == name:
                for sample in family.samples:
                    labels = dict(zip(family.spec.labels, sample.labels, strict=True))
                    value = sample.count if isinstance(sample, HistogramSample) else sample.value
                    found.append((labels, float(value)))
        return found

    def value(self, name: str, **labels: str) -> float:
        """Sum of the samples whose labels have these values."""
        return sum(
            value
            for found, value in self.rows(name)
            if all(found[key] == wanted for key, wanted in labels.items())
        )

    def outcomes(self, **labels: str) -> dict[str, int]:
        """Rewrites by outcome."""
        totals: Counter[str] = Counter()
        for found, value in self.rows("kptrace_rewrite_duration_seconds"):
            if all(found[key] == wanted for key, wanted in labels.items()):
                totals[found["outcome"]] += int(value)
        return dict(totals)

    def lost(self, reason: str) -> int:
        """Losses for one reason."""
        return self.signal.losses()["rewrite", reason]

    def close(self) -> None:
        """Detach everything."""
        self.signal.close()
        self.processes.close()
        self.loop.close()
        self.netns.close()
