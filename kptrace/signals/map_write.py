# SPDX-License-Identifier: Apache-2.0
"""The rewrite signal of a data plane that consists of BPF maps and programs: every write, and bursts of them as rewrites."""

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import structlog

from kptrace.kernel.bytecode import Bytecode
from kptrace.kernel.host import Host
from kptrace.model.errors import KernelError
from kptrace.model.metrics import MetricFamily, MetricSpec
from kptrace.model.rewrite import ProcessRun, Rewrite
from kptrace.model.signal import MechanismState, State
from kptrace.signals import map_write_metrics as metrics
from kptrace.signals.eventloop import EventLoop
from kptrace.signals.map_write_bursts import Bursts, first_begins
from kptrace.signals.map_write_kernel import MapWriteKernel, Running, still_inside
from kptrace.signals.map_write_order import InOrder
from kptrace.signals.map_write_records import MapWrite, Replacement, WatchedMap, decode
from kptrace.signals.processes import ProcessTable, cgroup_path, read_process
from kptrace.signals.writers import WriterRule, Writers

TICK_SECONDS = 0.1
#: From a call's end to its record in the ring is microseconds; what came before others of so long ago is in order.
HOLD_NS = 20_000_000
#: A call is microseconds, the load of a large program tens of milliseconds: of what is older procfs is asked.
OLD_NS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Options:
    """What can be set of this signal; the calls come in the loop's thread.

    Attributes:
        writers: rows before those of the table.
        on_write: gets each call that wrote to a watched map, or failed to, in the order in which they ended.
        on_replacement: gets each call by which an agent changed programs, in the same order.
        on_rewrite: gets each rewrite when it is over, of any outcome.
        settled: called when everything that ended up to a time, ns of CLOCK_MONOTONIC, was handed over, if it was not
            lost.
    """

    writers: tuple[WriterRule, ...] = ()
    on_write: Callable[[MapWrite], None] = lambda _: None
    on_replacement: Callable[[Replacement], None] = lambda _: None
    on_rewrite: Callable[[Rewrite], None] = lambda _: None
    settled: Callable[[int], None] = lambda _: None


class MapWriteSignal:
    """Implements `kptrace.model.signal.Source`."""

    name = "map_write"

    def __init__(
        self,
        bytecode: Bytecode,
        loop: EventLoop,
        host: Host = Host(),
        processes: Callable[[], ProcessTable] | None = None,
        options: Options = Options(),
    ) -> None:
        """Nothing is attached before `start`, and nothing is told before `watch`.

        Args:
            bytecode: of `map_write_kernel.REQUEST`.
            loop: whose thread everything but `families` runs in.
            host: roots of procfs and sysfs.
            processes: who runs, up to now; by default those that still do when they are asked for.
            options: see `Options`.
        """
        self._loop = loop
        self._host = host
        self._options = options
        self._log = structlog.get_logger(signal=self.name)
        self._kernel = MapWriteKernel(bytecode, self._receive, host)
        self._shared = processes
        self._own = self._no_processes()
        self._writers = Writers(options.writers)
        self._counts = metrics.MapWriteCounts()
        self._calls = InOrder()
        self._bursts = Bursts(self._who)
        self._maps: dict[int, WatchedMap] = {}
        self._watching = 0
        self._agents = 0
        self._unwatched = 0
        self._undecodable = 0
        self._last_losses: Mapping[str, int] = {}
        self._closed = False
        self._state = self._row(State.OFF, "starting")

    def start(self) -> None:
        """Attach, and take everything in from now on.

        Raises:
            PrivilegeError, KernelError, UnsupportedError: what could not be attached.
        """
        self.attach()
        self.follow()

    def attach(self) -> None:
        """The part of `start` that takes time; on any thread."""
        self._kernel.attach(self._host.sys)

    def follow(self) -> None:
        """The rest of `start`."""
        if not self._closed:
            self._loop.add_reader(self._kernel.fd, self.consume)
            self._loop.call_every(TICK_SECONDS, self.consume)
            self._state = self._row(State.ACTIVE, "ok")

    def watch(self, maps: Mapping[int, WatchedMap]) -> None:
        """Tell writes to these maps, by the kernel's ids, and to no others from now on.

        Raises:
            KernelError: the kernel's list of them could not be changed.
        """
        if self._closed:
            return
        # Of maps that are gone, records may still come.
        self._maps |= {each.number: each for each in maps.values()}
        self._unwatched = self._kernel.watch(maps)
        self._watching = len(maps) - self._unwatched

    def agents(self, tgids: Collection[int]) -> None:
        """Tell what these processes do to programs, and no others from now on.

        Raises:
            KernelError: the kernel's list of them could not be changed.
        """
        if not self._closed:
            self._agents = len(tgids) - self._kernel.agents(tgids)

    def _no_processes(self) -> ProcessTable:
        proc = self._host.proc
        return ProcessTable(lambda tgid: read_process(proc, tgid))

    def _who(self, tgid: int) -> tuple[ProcessRun, str]:
        processes = self._shared() if self._shared is not None else self._own
        chain = processes.chain(tgid)
        # A map is the node's, whatever network namespace its writer is in.
        writer = self._writers.classify(
            chain, watched_netns=True, cgroup=lambda run: cgroup_path(self._host.proc, run.tgid)
        )
        return chain[0] if chain and chain[0].tgid == tgid else ProcessRun(tgid), writer

    def _receive(self, data: bytes) -> None:
        call = decode(data)
        if call is None or (isinstance(call, MapWrite) and call.map not in self._maps):
            self._undecodable += 1
        else:
            self._calls.put(call)

    def consume(self) -> None:
        """Take in and hand over everything up to a moment ago. Not from within a listener."""
        if self._closed:
            return
        until = time.monotonic_ns() - HOLD_NS
        # In this order: what is under way no more is in the ring by now.
        under_way = [(each.tgid, each.begin_ns) for each in self._under_way()]
        if self._kernel.consume():
            # Without exec records a process id could have got a new owner meanwhile.
            self._own = self._no_processes()
        for call in self._calls.until(until):
            self._apply(call)
        held = ((call.tgid, call.begin_ns) for call in self._calls.held())
        for rewrite in self._bursts.settle(until, first_begins([*under_way, *held])):
            self._tell(rewrite)
        self._options.settled(until)

    def _under_way(self) -> Iterator[Running]:
        """Calls that have not returned, without those whose return the kernel side missed."""
        for each in self._kernel.running():
            if time.monotonic_ns() - each.begin_ns > OLD_NS and not still_inside(self._host.proc, each):
                self._kernel.forget(each)
            else:
                yield each

    def _apply(self, call: MapWrite | Replacement) -> None:
        if isinstance(call, MapWrite):
            map_ = self._maps[call.map]
            self._counts.add(call, map_)
            self._options.on_write(call)
            finished = self._bursts.write(call, map_)
        else:
            self._options.on_replacement(call)
            finished = self._bursts.replacement(call)
        for rewrite in finished:
            self._tell(rewrite)

    def _tell(self, rewrite: Rewrite) -> None:
        self._counts.add_rewrite(rewrite)
        self._options.on_rewrite(rewrite)

    def _row(self, state: State, reason: str, detail: str = "") -> MechanismState:
        return MechanismState(self.name, "tracepoint", state, reason, detail)

    def status(self, *, names: bool) -> Mapping[str, object]:
        """What /status shows of it."""
        return {
            "map writes": {
                "watched maps": self._watching,
                "maps beyond the bound": self._unwatched,
                "watched processes": self._agents,
                "out of order": self._calls.late,
            }
        }

    def losses(self) -> Mapping[tuple[str, str], int]:
        """Lost events by (signal, reason), all reasons from the start."""
        kernel = self._last_losses if self._closed else self._kernel.losses()
        reasons = {**kernel, "undecodable": self._undecodable}
        return {(self.name, reason): count for reason, count in reasons.items()}

    def describe(self) -> Sequence[MetricSpec]:
        """See `Source`."""
        return metrics.SPECS

    def states(self) -> Sequence[MechanismState]:
        """See `Source`."""
        return [self._state]

    def families(self) -> Iterable[MetricFamily]:
        """See `Source`."""
        return self._counts.families()

    def close(self) -> None:
        """Detach. Idempotent."""
        if self._closed:
            return
        self._last_losses = self._kernel.losses()
        self._closed = True
        try:
            self._loop.remove_reader(self._kernel.fd)
        except (KeyError, KernelError):
            self._log.debug("reader_was_not_there")
        self._kernel.close()
