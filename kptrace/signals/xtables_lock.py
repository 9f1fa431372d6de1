# SPDX-License-Identifier: Apache-2.0
"""The xtables lock: how long writers of legacy tables wait for it, and who holds it."""

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import structlog

from kptrace.kernel.bytecode import Bytecode
from kptrace.kernel.host import Host
from kptrace.kernel.netns import NetworkNamespace
from kptrace.model.errors import KernelError
from kptrace.model.metrics import MetricFamily, MetricSpec
from kptrace.model.signal import MechanismState, State
from kptrace.signals import xtables_lock_reduce as reduce
from kptrace.signals.eventloop import EventLoop
from kptrace.signals.processes import ProcessTable, cgroup_path, read_process
from kptrace.signals.writers import WriterRule, Writers
from kptrace.signals.xtables_lock_kernel import XtablesLockKernel
from kptrace.signals.xtables_lock_records import REPEAT_NS, Kind, LockState, decode

TICK_SECONDS = 0.5
#: Where iptables has it, seen from the host's first process.
_LOCK_FILE = "1/root/run/xtables.lock"


@dataclass(frozen=True, slots=True)
class Options:
    """What can be set of this signal.

    Attributes:
        writers: rows before those of the table.
        on_wait: gets each wait that ended with the lock, of a process in the watched namespace.
    """

    writers: tuple[WriterRule, ...] = ()
    on_wait: Callable[[LockState], None] = lambda _: None


class XtablesLockSignal:
    """Implements `kptrace.model.signal.Source`."""

    name = "xtables_lock"

    def __init__(
        self,
        bytecode: Bytecode,
        netns: NetworkNamespace,
        loop: EventLoop,
        host: Host = Host(),
        processes: Callable[[], ProcessTable] | None = None,
        options: Options = Options(),
    ) -> None:
        """Nothing is attached before `start`.

        Args:
            bytecode: of `xtables_lock_kernel.REQUEST`.
            netns: the watched network namespace.
            loop: whose thread everything but `families` runs in.
            host: roots of procfs and sysfs.
            processes: who runs, up to now, as another signal keeps it in the same thread (`RewriteSignal.processes`);
                without it only procfs is asked, and who is gone by then has no name.
            options: see `Options`.
        """
        self._netns = netns
        self._loop = loop
        self._host = host
        self._log = structlog.get_logger(signal=self.name)
        self._shared = processes
        self._own = self._no_processes()
        self._writers = Writers(options.writers)
        self._on_wait = options.on_wait
        self._kernel = XtablesLockKernel(bytecode, self._receive)
        self._counts = reduce.LockCounts(netns.inode, self._writer, self._host_lock())
        self._undecodable = 0
        self._last_losses: Mapping[str, int] = {}
        self._closed = False
        self._state = self._row(State.OFF, "starting")

    def start(self) -> None:
        """Attach, and take everything in from now on.

        Raises:
            PrivilegeError, KernelError, UnsupportedError: what could not be attached.
        """
        self._kernel.attach(self._host.sys)
        self._loop.add_reader(self._kernel.fd, self.consume)
        self._loop.call_every(TICK_SECONDS, self.tick)
        self._state = self._row(State.ACTIVE, "ok")

    def _no_processes(self) -> ProcessTable:
        proc = self._host.proc
        return ProcessTable(lambda tgid: read_process(proc, tgid))

    def _host_lock(self) -> list[tuple[int, int]]:
        """The host's lock file, if the host's network namespace is the watched one and it is there already."""
        try:
            if (self._host.proc / "1/ns/net").stat().st_ino != self._netns.inode:
                return []
            found = (self._host.proc / _LOCK_FILE).stat()
        except OSError:
            return []
        return [(os.major(found.st_dev) << 20 | os.minor(found.st_dev), found.st_ino)]

    def _writer(self, state: LockState) -> str:
        processes = self._shared() if self._shared is not None else self._own
        return self._writers.classify(
            processes.chain(state.tgid, state.parents),
            watched_netns=state.netns == self._netns.inode,
            cgroup=lambda run: cgroup_path(self._host.proc, run.tgid),
        )

    def _receive(self, data: bytes) -> None:
        record = decode(data)
        if record is None:
            self._undecodable += 1
        else:
            self._counts.apply(record)
            if record.kind is Kind.TAKEN and record.netns == self._netns.inode:
                self._on_wait(record)

    def consume(self) -> None:
        """Take everything in that happened up to now."""
        if not self._closed:
            self._kernel.consume()

    def tick(self) -> None:
        """What is not driven by events: who waits and holds, and what became of those who gave up."""
        if self._closed:
            return
        if self._netns.ended():
            self._state = self._row(State.OFF, "namespace_ended", "the watched network namespace is gone")
            self._let_go()
            return
        self._kernel.consume()
        # Without another signal's exec records a process id could have got a new owner meanwhile.
        self._own = self._no_processes()
        waiting = []
        for state in self._kernel.waiting():
            if self._alive(state.tgid):
                waiting.append(state)
            else:
                self._kernel.forget_waiting(state)
        now = time.monotonic_ns()
        for state in self._kernel.attempts():
            if now - state.end_ns < REPEAT_NS and self._alive(state.tgid):
                waiting.append(state)
            else:
                self._kernel.forget_attempt(state)
        self._counts.see((*waiting, *self._kernel.held()))

    def _alive(self, tgid: int) -> bool:
        return (self._host.proc / str(tgid)).exists()

    def _row(self, state: State, reason: str, detail: str = "") -> MechanismState:
        return MechanismState(self.name, "tracepoint", state, reason, detail)

    def status(self, *, names: bool) -> Mapping[str, object]:
        """Nothing beyond its state and its metrics."""
        return {}

    def losses(self) -> Mapping[tuple[str, str], int]:
        """Lost events by (signal, reason), all reasons from the start."""
        kernel = self._last_losses if self._closed else self._kernel.losses()
        reasons = {**kernel, "undecodable": self._undecodable}
        return {(self.name, reason): count for reason, count in reasons.items()}

    def describe(self) -> Sequence[MetricSpec]:
        """See `Source`."""
        return reduce.SPECS

    def states(self) -> Sequence[MechanismState]:
        """See `Source`."""
        return [self._state]

    def families(self) -> Iterable[MetricFamily]:
        """See `Source`. Reads the maps of who waits and who holds."""
        now = time.monotonic_ns()
        if self._closed:
            return self._counts.families((), (), now)
        waiting = reduce.still_waiting(self._kernel.waiting(), self._kernel.attempts(), now)
        return self._counts.families(waiting, self._kernel.held(), now)

    def close(self) -> None:
        """Detach. Idempotent."""
        self._let_go()

    def _let_go(self) -> None:
        if self._closed:
            return
        self._last_losses = self._kernel.losses()
        self._closed = True
        try:
            self._loop.remove_reader(self._kernel.fd)
        except (KeyError, KernelError):
            self._log.debug("reader_was_not_there")
        self._kernel.close()
