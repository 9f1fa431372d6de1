# SPDX-License-Identifier: Apache-2.0
"""The xtables lock's signal on a test's namespace, with a lock file and programs of the test's own."""

import fcntl
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from kptrace.daemon.loop import Loop
from kptrace.experiments.netns import Namespace
from kptrace.kernel.bytecode import Bytecode
from kptrace.kernel.netns import NetworkNamespace
from kptrace.model.metrics import HistogramSample, Sample
from kptrace.signals.processes import ProcessTable
from kptrace.signals.writers import WriterRule
from kptrace.signals.xtables_lock import Options, XtablesLockSignal
from kptrace.signals.xtables_lock_records import Kind, LockState, decode

PATIENCE_SECONDS = 30.0
#: The test process itself.
TESTER = "tester"


class _Recording(XtablesLockSignal):
    def __init__(self, *arguments: object, **named: object) -> None:
        self.records: list[LockState] = []
        super().__init__(*arguments, **named)  # type: ignore[arg-type]

    def _receive(self, data: bytes) -> None:
        record = decode(data)
        assert record
        self.records.append(record)
        super()._receive(data)


class XtablesLockBench:
    """One running signal; `waits` and `holds` are its raw records of one lock file."""

    def __init__(
        self,
        bytecode: Bytecode,
        namespace: Namespace,
        folder: Path,
        processes: Callable[[], ProcessTable] | None = None,
    ) -> None:
        self.namespace = namespace
        self.folder = folder
        self.path = folder / "xtables.lock"
        self.path.touch()
        self.netns = NetworkNamespace(namespace.path)
        self.loop = Loop()
        self.signal = _Recording(
            bytecode,
            self.netns,
            self.loop,
            processes=processes,
            options=Options((WriterRule(TESTER, ("python3*",)),)),
        )
        self.signal.start()

    def program(self, name: str) -> Path:
        """A shell whose executable has this name."""
        path = self.folder / name
        if not path.exists():
            shutil.copy("/bin/dash", path)
        return path

    def shell(self, script: str, name: str = "kube-proxy") -> list[str]:
        """The command line of a program of this name that runs a script; iptables in it uses the bench's lock file."""
        return [
            "env",
            f"XTABLES_LOCKFILE={self.path}",
            str(self.program(name)),
            "-c",
            f"cd {self.folder}\n{script}\n:",
        ]

    def settle(self) -> None:
        """Take in everything that happened so far."""
        self.signal.tick()

    def until(self, condition: Callable[[], bool]) -> None:
        """Run the loop until something is so."""
        end = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            assert time.monotonic() < end, "it never came"
            self.loop.run_once(0.05)

    def blocked(self) -> int:
        """How many wait inside flock(2), as /proc/locks has it."""
        mark = f":{self.path.stat().st_ino} "
        return sum(
            "-> FLOCK" in line and mark in line for line in Path("/proc/locks").read_text().splitlines()
        )

    def _records(self, kind: Kind) -> list[LockState]:
        inode = self.path.stat().st_ino
        return [each for each in self.signal.records if each.kind is kind and each.inode == inode]

    @property
    def waits(self) -> list[LockState]:
        """Every wait that ended with the lock."""
        return self._records(Kind.TAKEN)

    @property
    def holds(self) -> list[LockState]:
        """Every hold that ended."""
        return self._records(Kind.HOLD)

    def values(self, name: str) -> dict[str, float]:
        """A family's values, or counts, by writer; those that are not 0."""
        found = {}
        for family in self.signal.families():
            for sample in family.samples if family.spec.name == name else ():
                value = sample.count if isinstance(sample, HistogramSample) else sample.value
                assert isinstance(sample, HistogramSample | Sample)
                found[sample.labels[0]] = float(value)
        return {writer: value for writer, value in found.items() if value}

    @property
    def waited(self) -> dict[str, float]:
        """Waits by writer."""
        return self.values("kptrace_xtables_lock_wait_seconds")

    @property
    def held(self) -> dict[str, float]:
        """Holds by writer."""
        return self.values("kptrace_xtables_lock_held_seconds")

    @property
    def holding(self) -> dict[str, float]:
        """Who holds the lock now."""
        return self.values("kptrace_xtables_lock_current_hold_seconds")

    @property
    def waiting(self) -> dict[str, float]:
        """Who waits for it now."""
        return self.values("kptrace_xtables_lock_longest_wait_seconds")

    def flock(self, descriptor: int, operation: int) -> None:
        """Lock or unlock, in a thread of the test process inside the namespace."""
        self.namespace.call(lambda: fcntl.flock(descriptor, operation))

    def close(self) -> None:
        """Detach everything."""
        self.signal.close()
        self.loop.close()
        self.netns.close()
