# SPDX-License-Identifier: Apache-2.0
"""The sources that one daemon runs: which parts this kernel and the settings allow, compiled and started."""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace

import structlog

from kptrace.daemon import (
    datapath_parts,
    drift_parts,
    kube_proxy_parts,
    lookup_parts,
    phases_parts,
    programming_parts,
    rewrite_parts,
)
from kptrace.daemon.late import LateParts, Listener
from kptrace.daemon.loop import Loop
from kptrace.daemon.opening import open_node
from kptrace.daemon.part import Part, Running
from kptrace.daemon.reports import Reports
from kptrace.daemon.settings import Settings
from kptrace.daemon.unused import STARTING, Unused
from kptrace.kernel.bytecode import Bytecode
from kptrace.kernel.capabilities import Capability, effective_capabilities, missing_capabilities
from kptrace.kernel.compile import Compiler
from kptrace.kernel.features import TABLE, probe
from kptrace.kernel.memlock import raise_memlock
from kptrace.model.errors import CompileError, KernelError, KptraceError, PrivilegeError, UnsupportedError
from kptrace.model.signal import MechanismState, Source, State
from kptrace.signals.mechanisms import SLOW_FEATURES, judge_all

IDENTITY_POLL_SECONDS = 0.5
#: Without these nothing can be loaded or linked, and no namespace entered.
_NEEDED = (Capability.BPF, Capability.PERFMON, Capability.NET_ADMIN, Capability.SYS_ADMIN)

_NO_CODE = Bytecode({}, {}, {})


#: Every part there is. Those of one group are tried in this order.
PARTS: tuple[Part, ...] = (
    *lookup_parts.PARTS,
    *rewrite_parts.PARTS,
    *datapath_parts.PARTS,
    *phases_parts.PARTS,
    *programming_parts.PARTS,
    *drift_parts.PARTS,
    *kube_proxy_parts.PARTS,
)


class Parts:
    """All sources of one daemon; `start` attaches them, `close` lets everything go.

    Attributes:
        sources: of metrics.
        reports: of those that run.
        from_cache: whether nothing had to be compiled.
    """

    def __init__(self, settings: Settings, loop: Loop, parts: Iterable[Part] = PARTS) -> None:
        """Open the namespace and the names: what a user may have got wrong is said before anything is attached.

        Raises:
            UsageError, ManifestError: the settings lead nowhere.
        """
        self._settings = settings
        self._loop = loop
        self._parts = tuple(parts)
        self._log = structlog.get_logger()
        self._stack = ExitStack()
        self._node = open_node(settings, loop, self._stack)
        self._unused = Unused()
        self._running: list[Running] = []
        self.reports = Reports(self._node, self._running)
        # Those that measure by what they load; the others only join and compare what these and the names tell.
        self._loaded: list[Part] = []
        self._failures: list[KptraceError] = []
        self.sources: list[Source] = [self._node.identity, self._unused]
        self.from_cache = True
        self._started = False

    @property
    def ready(self) -> bool:
        """Whether what can be attached is attached. Names may come later: a lost API server changes nothing."""
        return self._started

    def states(self) -> list[MechanismState]:
        """Every mechanism's state."""
        return [state for source in self.sources for state in source.states()]

    def start(self) -> None:
        """Compile, attach and begin; names from a file are known when this returns.

        Raises:
            PrivilegeError: the kernel lets this process load nothing.
            UnsupportedError: the mechanism that was asked for cannot be had, or none at all.
            CompileError: the same, for want of BCC.
            ManifestError: the identity file cannot be understood.
        """
        self._node.identity.start()
        states = {(state.signal, state.mechanism): state for state in self._probe()}
        self._unused.add(states.values())
        wanted = [part for part in self._parts if self._wanted(part, states)]
        late = [part for part in wanted if part.late]
        for part in late:
            self._unused.off(part, STARTING, "after the signals that others wait for")
        candidates = [part for part in wanted if not part.late]
        running: dict[str, str] = {}
        while candidates:
            # At most one of each group at a time: where it works, the others are not even compiled.
            first = {part.group: part for part in reversed(candidates)}
            started = self._start_each([part for part in candidates if part is first[part.group]])
            running |= {group: first[group].mechanism for group in started}
            candidates = [
                part for part in candidates if part is not first[part.group] and part.group not in started
            ]
        self._unused.settle(self._parts, running)
        if not self._loaded and self._failures:
            for failure in self._failures:
                if isinstance(failure, CompileError):
                    raise failure
            reasons = "; ".join(
                f"{row.mechanism}: {row.detail or row.reason}" for row in self._unused.states()
            )
            raise UnsupportedError(
                f"nothing can be measured on this kernel: {reasons}",
                remedy="see `kptrace check`, and docs/support.md for the kernels that are supported",
            )
        rest = LateParts(
            self._node, late, Listener(self._unused.learn, self._running_late, self._refused_late)
        )
        self._stack.callback(rest.close)
        rest.start()
        self._loop.call_every(IDENTITY_POLL_SECONDS, self._node.identity.poll)
        self._started = True

    def _probe(self) -> list[MechanismState]:
        """What this kernel can do for each mechanism, as far as that is quickly known.

        Raises:
            PrivilegeError: a capability is missing without which nothing can be measured.
        """
        missing = missing_capabilities(effective_capabilities(self._settings.host), _NEEDED)
        if missing:
            raise PrivilegeError(
                f"missing {', '.join(map(str, missing))}", remedy="run as root, or grant these capabilities"
            )
        if trouble := raise_memlock():
            self._log.debug("memlock", detail=trouble)
        quick = [feature for feature in TABLE if feature.name not in SLOW_FEATURES]
        return judge_all(probe(self._settings.host, table=quick))

    def _wanted(self, part: Part, states: Mapping[tuple[str, str], MechanismState]) -> bool:
        """Whether to try a part; if not, its state says why."""
        if disabled := part.disabled(self._settings):
            self._unused.off(part, "disabled", disabled)
            return False
        known = states[part.signal, part.mechanism]
        if known.state is State.UNAVAILABLE:
            self._unavailable(part, known.reason, UnsupportedError(known.detail))
            return False
        return True

    def _start_each(self, parts: list[Part]) -> set[str]:
        """Compile together, start one after the other; return the groups of those that run."""
        compiler = Compiler(self._settings.host.vmlinux_btf, self._settings.cache_dir)
        answers = iter(compiler.build_each([part.request for part in parts if part.request is not None]))
        self.from_cache = self.from_cache and compiler.from_cache
        running = set()
        for part in parts:
            answer = _NO_CODE if part.request is None else next(answers)
            if not isinstance(answer, Bytecode):
                reason = "btf_lacking" if isinstance(answer, UnsupportedError) else _reason(answer)
                self._unavailable(part, reason, answer)
            elif self._start_one(part, answer):
                running.add(part.group)
        return running

    def _start_one(self, part: Part, code: Bytecode) -> bool:
        with ExitStack() as own:
            try:
                source = part.start(replace(self._node, stack=own), code)
            except (UnsupportedError, KernelError, PrivilegeError) as error:
                self._unavailable(part, _reason(error), error)
                return False
            self._stack.push(own.pop_all())
        self._take(part, source)
        return True

    def _take(self, part: Part, source: Running) -> None:
        self._unused.remove(part)
        if part.request is not None:
            self._loaded.append(part)
        self._running.append(source)
        self.sources.append(source)

    def _unavailable(self, part: Part, reason: str, error: KptraceError) -> None:
        """Go on without a mechanism; its state says why.

        Raises:
            CompileError: BCC cannot compile what the user asked for.
            UnsupportedError: the user asked for just this mechanism.
        """
        if part.signal == "lookup" and self._settings.lookup_mechanism == part.mechanism:
            if isinstance(error, CompileError):
                raise error
            raise UnsupportedError(
                f"look-ups cannot be measured by {part.mechanism}: {error}",
                remedy="use --lookup-mechanism=auto",
            ) from error
        detail = str(error)
        self._failures.append(error)
        self._log.warning(
            "mechanism_unavailable",
            signal=part.signal,
            mechanism=part.mechanism,
            reason=reason,
            detail=detail,
        )
        row = MechanismState(part.signal, part.mechanism, State.UNAVAILABLE, reason, detail)
        self._unused.add([row])

    def _running_late(self, part: Part, source: Running) -> None:
        self._take(part, source)
        self._unused.settle(self._parts, {part.group: part.mechanism})

    def _refused_late(self, part: Part, error: KptraceError) -> None:
        self._unavailable(part, _reason(error), error)

    def close(self) -> None:
        """Detach and free everything, in reverse order. Idempotent."""
        self._stack.close()


def _reason(error: KptraceError) -> str:
    if isinstance(error, CompileError):
        return "compile_failed"
    # All capabilities are there (`_probe`): it is the kernel that does not let anybody do this.
    return "unsupported" if isinstance(error, UnsupportedError) else "attach_refused"
