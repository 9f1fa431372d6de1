# SPDX-License-Identifier: Apache-2.0
"""The rewrite signal by syscall tracepoints: every transaction's duration, outcome, writer and size."""

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import structlog

from kptrace.kernel.bytecode import Bytecode
from kptrace.kernel.host import Host
from kptrace.kernel.netns import NetworkNamespace
from kptrace.model.errors import KernelError
from kptrace.model.metrics import MetricFamily, MetricSpec
from kptrace.model.rewrite import Outcome, ProcessRun, Rewrite
from kptrace.model.signal import MechanismState, State
from kptrace.signals import rewrite_metrics as metrics
from kptrace.signals.eventloop import EventLoop
from kptrace.signals.processes import ProcessTable, cgroup_path, read_process
from kptrace.signals.rewrite_generation import GenerationWatch, RulesetSocket
from kptrace.signals.rewrite_kernel import RewriteKernel
from kptrace.signals.rewrite_labels import TableNames
from kptrace.signals.rewrite_objects import LEAST_SECONDS, RulesetObjects
from kptrace.signals.rewrite_published import Published
from kptrace.signals.rewrite_records import Transaction, decode
from kptrace.signals.rewrite_reduce import Reducer
from kptrace.signals.rewrite_requests import WritersRequests, writer_itself
from kptrace.signals.rewrite_requests_records import Requests, is_requests
from kptrace.signals.rewrite_running import RunningRewrites
from kptrace.signals.writers import WriterRule, Writers

TICK_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Options:
    """What can be set of this signal.

    Attributes:
        writers: rows before those of the table.
        least_dump_seconds: no two dumps of the ruleset come closer.
    """

    writers: tuple[WriterRule, ...] = ()
    least_dump_seconds: float = LEAST_SECONDS


class RewriteSignal:
    """Implements `kptrace.model.signal.Source`."""

    name = "rewrite"

    def __init__(
        self,
        bytecode: Bytecode,
        netns: NetworkNamespace,
        loop: EventLoop,
        host: Host = Host(),
        on_commit: Callable[[Rewrite], None] = lambda _: None,
        options: Options = Options(),
        processes: Callable[[], ProcessTable] | None = None,
        on_rewrite: Callable[[Rewrite], None] = lambda _: None,
        on_bytes: Callable[[Rewrite, bytes], None] = lambda _rewrite, _data: None,
        on_requests: Callable[[Requests], None] = lambda _: None,
    ) -> None:
        """Nothing is attached before `start`.

        Args:
            bytecode: of `rewrite_kernel.REQUEST`.
            netns: the watched network namespace.
            loop: whose thread everything but `families` runs in.
            host: roots of procfs and sysfs.
            on_commit: called after each committed rewrite of the watched namespace; `details` has
                `rewrite_reduce.BASE_CHAINS` where base chains may have changed.
            options: see `Options`.
            processes: who runs, up to now; by default those that still do when they are asked for.
            on_rewrite: called after each rewrite of the watched namespace, of any outcome, before `on_commit`.
            on_bytes: called with the same, and the bounded copy of the writer's buffer.
            on_requests: called from `consume` and the ring's reader with what writers list, or delete of connections,
                by themselves.
        """
        self._netns = netns
        self._loop = loop
        self._host = host
        self._on_commit = on_commit
        self._log = structlog.get_logger(signal=self.name)
        self._inbox: deque[bytes] = deque()
        self._kernel = RewriteKernel(bytecode, self._inbox.append)
        self._names = TableNames()
        self._counts = metrics.RewriteCounts(self._names)
        self._objects = RulesetObjects(
            netns,
            loop,
            self._names,
            exact_sequence=self._kernel.knows_generation,
            least_seconds=options.least_dump_seconds,
        )
        table = ProcessTable(lambda tgid: read_process(host.proc, tgid))
        self._processes = processes or (lambda: table)
        self._on_rewrite = on_rewrite
        self._on_bytes = on_bytes
        writers = Writers(options.writers)

        def cgroup(run: ProcessRun) -> str:
            return cgroup_path(host.proc, run.tgid)

        def alive(tgid: int) -> bool:
            return (host.proc / str(tgid)).exists()

        self._reducer = Reducer(
            watched=netns.inode,
            exact_sequence=self._kernel.knows_generation,
            installed=self._objects,
            processes=self._processes(),
            writers=writers,
            cgroup=cgroup,
        )
        self._running = RunningRewrites(self._kernel, netns.inode, alive, self._reducer.writer)
        is_writer = writer_itself(self._processes, writers, cgroup, os.getpid())
        self._requests = WritersRequests(self._kernel, netns.inode, is_writer, alive, on_requests)
        self._ruleset = RulesetSocket(netns, self._log)
        self._generation = GenerationWatch(
            self._ruleset.generation, self._consume_records, self._running.busy
        )
        self._undecodable = 0
        self._last_losses: Mapping[str, int] = {}
        self._closed = False
        self._state = self._row(State.OFF, "starting")
        self._published = Published(self._state)

    def start(self) -> None:
        """Attach, and take everything in from now on.

        Raises:
            PrivilegeError, KernelError, UnsupportedError: what could not be attached.
        """
        self._kernel.attach(self._host.sys)
        self._loop.add_reader(self._kernel.fd, self._consume)
        self._loop.call_every(TICK_SECONDS, self.tick)
        sees = "generation" if self._kernel.knows_generation else "one bit of the generation"
        self._state = self._row(State.ACTIVE, "ok", f"outcome by {sees} and the sender's own socket")
        self.tick()

    def consume(self) -> None:
        """Take in every rewrite, and every request, up to now. For the loop's thread, and not from within a listener."""
        if not self._closed:
            self._requests.consume(self._consume_records)

    def tick(self) -> None:
        """What is not driven by events: missed commits, transactions under way, dumps that are due."""
        if self._closed:
            return
        if self._netns.ended():
            self._state = self._row(State.OFF, "namespace_ended", "the watched network namespace is gone")
            self._let_go()
            self._publish()
            return
        self._consume_records()
        if missing := self._generation.tick():
            self._log.info("untraced_commits", count=missing)
            self._objects.doubt()
        self._running.tick()
        self._objects.tick()
        self._publish()

    def _consume(self) -> None:
        self._consume_records()
        self._publish()

    def _consume_records(self) -> None:
        if self._kernel.consume():
            self._processes()  # by now it knows whoever wrote these
        # Not from within the ring's callback: what hears of a commit may come back here.
        while self._inbox:
            self._receive(self._inbox.popleft())

    def _receive(self, data: bytes) -> None:
        if is_requests(data):
            self._requests.record(data)
            return
        record = decode(data)
        if record is None:
            self._undecodable += 1
        elif record.netns != self._netns.inode:
            self._counts.add_elsewhere()
        else:
            self._account(record)

    def _account(self, record: Transaction) -> None:
        rewrite = self._reducer.rewrite(record)
        if rewrite is None:
            self._undecodable += 1
            return
        self._running.saw(rewrite.writer)
        self._counts.add(rewrite)
        if record.is_batch:
            self._generation.traced(rewrite.outcome)
        self._on_rewrite(rewrite)
        self._on_bytes(rewrite, record.data)
        if rewrite.outcome is Outcome.COMMITTED:
            self._on_commit(rewrite)

    def _publish(self) -> None:
        self._published = Published(
            self._state,
            self._objects.rows(),
            self._objects.exact,
            self._generation.generation,
        )

    def _row(self, state: State, reason: str, detail: str = "") -> MechanismState:
        return MechanismState(self.name, "tracepoint", state, reason, detail)

    def status(self, *, names: bool) -> Mapping[str, object]:
        """What /status shows of it."""
        return {"ruleset": self._published.ruleset(), "netlink_requests": self._requests.status()}

    def losses(self) -> Mapping[tuple[str, str], int]:
        """Lost events by (signal, reason), all reasons from the start."""
        kernel = dict(self._last_losses if self._closed else self._kernel.losses())
        requests = {"requests_full": kernel.pop("requests_full"), **self._requests.losses()}
        kernel |= {"untraced_commit": self._generation.untraced, "undecodable": self._undecodable}
        # Requests are no rewrites: what is missing of them, a sync lacks.
        missed = {"sync": requests, self.name: kernel}
        return {(signal, reason): n for signal, counts in missed.items() for reason, n in counts.items()}

    def describe(self) -> Sequence[MetricSpec]:
        """See `Source`."""
        return metrics.SPECS

    def states(self) -> Sequence[MechanismState]:
        """See `Source`."""
        return [self._published.state]

    def families(self) -> Iterable[MetricFamily]:
        """See `Source`. Reads the map of transactions under way, and what was last published."""
        yield from self._counts.families()
        yield from self._published.families()
        if not self._closed:
            yield MetricFamily(metrics.RUNNING, self._running.ages(time.monotonic_ns()))

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
        self._objects.close()
        self._ruleset.close()
