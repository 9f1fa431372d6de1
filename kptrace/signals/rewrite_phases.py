# SPDX-License-Identifier: Apache-2.0
"""The phases inside a rewrite, by the kernel's functions: fentry and fexit, or kprobe and kretprobe."""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

import structlog

from kptrace.kernel.bytecode import Bytecode
from kptrace.kernel.functions import Mechanism
from kptrace.kernel.host import Host
from kptrace.kernel.netns import NetworkNamespace
from kptrace.kernel.support import Context
from kptrace.model.errors import KptraceError, UnsupportedError
from kptrace.model.metrics import MetricFamily, MetricSpec
from kptrace.model.signal import MechanismState, State
from kptrace.signals.rewrite_phases_follow import PhasesFollower
from kptrace.signals.rewrite_phases_kernel import PhasesKernel
from kptrace.signals.rewrite_phases_records import decode
from kptrace.signals.rewrite_phases_reduce import SPECS, PhaseCounts

#: How often the daemon calls `tick`.
TICK_SECONDS: Final = 0.5


class RewritePhases:
    """Implements `kptrace.model.signal.Source`. `start` may run on any thread, `tick` and `close` are the loop's."""

    name = "rewrite_phases"

    def __init__(
        self,
        bytecode: Bytecode,
        mechanism: Mechanism,
        netns: NetworkNamespace,
        host: Host = Host(),
    ) -> None:
        """Nothing is attached before `start`.

        Args:
            bytecode: of `rewrite_phases_kernel.REQUESTS[mechanism]`.
            mechanism: fentry or kprobe.
            netns: the watched network namespace.
            host: where sysfs is.
        """
        self._netns = netns
        self._host = host
        self._log = structlog.get_logger(signal=self.name)
        self._counts = PhaseCounts()
        self._kernel = PhasesKernel(bytecode, mechanism, netns.inode, self._receive, host)
        self._follower = PhasesFollower(self._kernel, host)
        # Reading a module's BTF and attaching to it must not hold the loop up.
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kptrace-phases")
        self._following: Future[None] | None = None
        self._undecodable = 0
        self._last_losses: Mapping[str, int] = {}
        self._closed = False
        self._state = self._row(State.OFF, "starting")

    def start(self) -> None:
        """Attach to the functions that are there; this takes a while. From then on `tick` keeps up with their modules.

        Raises:
            UnsupportedError: functions are there, and none can be attached to.
            BtfError: the kernel's BTF cannot be read.
        """
        self._follower.tick()
        if not self._follower.attached and (reason := self._follower.hopeless()):
            raise UnsupportedError(f"{reason}; {Context(self._host).lockdown}", remedy="see 'kptrace check'")
        self._state = self._judge()

    def _receive(self, data: bytes) -> None:
        record = decode(data)
        if record is None:
            self._undecodable += 1
        else:
            self._counts.apply(record)

    def tick(self) -> None:
        """Take in what happened, and follow the modules: what has come is attached to by the tick after the next."""
        if self._closed:
            return
        if self._netns.ended():
            self._state = self._row(State.OFF, "namespace_ended", "the watched network namespace is gone")
            self.close()
            return
        self._kernel.consume()
        if self._following is None:
            if self._follower.due():
                self._following = self._worker.submit(self._follower.tick)
            return
        if not self._following.done():
            return
        done, self._following = self._following, None
        if isinstance(error := done.exception(), KptraceError):
            self._log.warning("btf_unreadable", error=str(error))
            return
        done.result()
        self._state = self._judge()

    def _judge(self) -> MechanismState:
        follower = self._follower
        detail = f"attached: {follower.names(follower.attached) or 'nothing yet'}"
        if pinned := follower.pinned():
            detail += f"; pins {', '.join(pinned)}"
        if follower.missing:
            detail += f"; not in this kernel: {follower.names(follower.missing)}"
        if follower.refused:
            detail += "; " + "; ".join(
                f"{hook.function}: {error}" for hook, error in follower.refused.items()
            )
            state = State.DEGRADED if follower.attached else State.UNAVAILABLE
            return self._row(state, "attach_refused", detail)
        if follower.missing:
            return self._row(State.DEGRADED, "function_missing", detail)
        return self._row(State.ACTIVE, "ok" if follower.attached else "waiting_for_module", detail)

    def _row(self, state: State, reason: str, detail: str = "") -> MechanismState:
        return MechanismState(self.name, self._kernel.mechanism, state, reason, detail)

    def losses(self) -> Mapping[tuple[str, str], int]:
        """Lost events by (signal, reason), all reasons from the start."""
        kernel = self._last_losses if self._closed else self._kernel.losses()
        reasons = {**kernel, "unpaired": self._counts.unpaired, "undecodable": self._undecodable}
        return {(self.name, reason): count for reason, count in reasons.items()}

    def status(self, *, names: bool) -> Mapping[str, object]:
        """Nothing beyond its state, which names the functions, and its metrics."""
        return {}

    def describe(self) -> Sequence[MetricSpec]:
        """See `Source`."""
        return SPECS

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
        self._worker.shutdown(wait=True)
        self._kernel.close()
