# SPDX-License-Identifier: Apache-2.0
"""What the daemon is made of: one part per signal and mechanism, and the node that they share."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Protocol

from kptrace.daemon.loop import Loop
from kptrace.daemon.recent import FlightRecorder
from kptrace.daemon.settings import Settings
from kptrace.identity.source import Identity
from kptrace.kernel.bytecode import Bytecode
from kptrace.kernel.compile import Request
from kptrace.kernel.netns import NetworkNamespace
from kptrace.model.rewrite import Rewrite
from kptrace.model.signal import Source
from kptrace.signals.clocks import unix_ns
from kptrace.signals.datapath import DatapathSignal
from kptrace.signals.map_write_records import MapWrite
from kptrace.signals.processes import ProcessTable
from kptrace.signals.sync_events import Sync
from kptrace.signals.sync_signal import SyncSignal

#: From a Service's namespace and name to JSON values by title.
Explain = Callable[[str, str], Mapping[str, object]]


class Running(Source, Protocol):
    """A signal that measures."""

    def losses(self) -> Mapping[tuple[str, str], int]:
        """Lost events by (signal, reason), all reasons from the start."""
        ...

    def status(self, *, names: bool) -> Mapping[str, object]:
        """Sections of /status by title: JSON values. Names of services and pods only where `names`."""
        ...


@dataclass(slots=True)
class Shared:
    """What one part has for others that start after it.

    Attributes:
        committed: called with every committed rewrite of the watched namespace.
        rewritten: called with every rewrite of it, of any outcome.
        written: called with every rewrite of it, of any outcome, and the copy of its bytes.
        synced: called with every writer's run that is over.
        settled: called when all that happened up to a time, ns of CLOCK_MONOTONIC, was handed over, if it was not lost.
        processes: who runs, up to now; None where nobody follows that.
        sync: the writers' runs; None where nobody follows them.
        consume_rewrites: takes in every rewrite up to now.
        consume_lock: takes in every wait for the xtables lock up to now.
        rewrite_losses: rewrites that never came, by reason; None where nobody traces them.
        explain: each tells what it knows of a Service, by title; called from any thread.
        recorder: keeps the slow and the failed.
        datapath: which of Cilium's maps and programs are there; None where nobody looks.
        map_written: called with every call that wrote to a map of Cilium's, in the order in which they ended.
        map_rewritten: called with every burst of them when it is over.
        map_settled: as `settled`, for these.
        map_losses: calls that were missed, by reason; None where nobody traces them.
        proxy: kube-proxy's mode and version, as it says itself; empty where nobody asks it.
    """

    committed: list[Callable[[Rewrite], None]] = field(default_factory=list)
    rewritten: list[Callable[[Rewrite], None]] = field(default_factory=list)
    written: list[Callable[[Rewrite, bytes], None]] = field(default_factory=list)
    synced: list[Callable[[Sync], None]] = field(default_factory=list)
    settled: list[Callable[[int], None]] = field(default_factory=list)
    processes: Callable[[], ProcessTable] | None = None
    sync: SyncSignal | None = None
    consume_rewrites: Callable[[], None] = lambda: None
    consume_lock: Callable[[], None] = lambda: None
    rewrite_losses: Callable[[], Mapping[tuple[str, str], int]] | None = None
    explain: list[Explain] = field(default_factory=list)
    recorder: FlightRecorder = field(default_factory=lambda: FlightRecorder(unix_ns))
    datapath: DatapathSignal | None = None
    map_written: list[Callable[[MapWrite], None]] = field(default_factory=list)
    map_rewritten: list[Callable[[Rewrite], None]] = field(default_factory=list)
    map_settled: list[Callable[[int], None]] = field(default_factory=list)
    map_losses: Callable[[], Mapping[tuple[str, str], int]] | None = None
    proxy: Callable[[], tuple[str, str]] = lambda: ("", "")


@dataclass(frozen=True, slots=True)
class Node:
    """What every part gets.

    Attributes:
        settings: as the user gave them.
        loop: whose thread owns all that changes.
        netns: the watched network namespace.
        identity: the Kubernetes names.
        stack: closed when the daemon ends, in reverse order: what a part opens goes here.
        shared: what parts have for one another.
    """

    settings: Settings
    loop: Loop
    netns: NetworkNamespace
    identity: Identity
    stack: ExitStack
    shared: Shared = field(default_factory=Shared)


@dataclass(frozen=True, slots=True)
class Part:
    """One mechanism of one signal: what it needs compiled, and how it is started.

    Attributes:
        signal, mechanism: a row of `kptrace.signals.mechanisms.MECHANISMS`.
        request: what the compile child makes for it; None for a part that loads nothing into the kernel.
        start: attaches it; raises KernelError or UnsupportedError where this kernel refuses.
        disabled: the setting that switches it off, as a user would write it, or nothing.
        alternative: whether it is one of several ways to measure the same: the first that works is taken.
        late: whether it is started after the others, in a thread of its own: nothing waits for it. Its `start` may call
            nothing of the loop but `call_soon_threadsafe`.
    """

    signal: str
    mechanism: str
    request: Request | None
    start: Callable[[Node, Bytecode], Running]
    disabled: Callable[[Settings], str] = lambda _: ""
    alternative: bool = False
    late: bool = False

    @property
    def group(self) -> str:
        """Parts of one group are tried in their order until one works."""
        return self.signal if self.alternative else f"{self.signal}/{self.mechanism}"
