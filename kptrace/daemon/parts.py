# SPDX-License-Identifier: Apache-2.0
"""The sources that one daemon runs: which parts this kernel and the settings allow, compiled and started."""

import threading
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace

import structlog

from kptrace.daemon import lookup_parts, rewrite_parts
from kptrace.daemon.loop import Loop
from kptrace.daemon.part import Node, Part, Running, Unused
from kptrace.daemon.settings import Settings
from kptrace.identity.resources import Level
from kptrace.identity.source import Identity, IdentitySettings
from kptrace.kernel.bytecode import Bytecode
from kptrace.kernel.capabilities import Capability, effective_capabilities, missing_capabilities
from kptrace.kernel.compile import Compiler
from kptrace.kernel.features import TABLE, probe
from kptrace.kernel.memlock import raise_memlock
from kptrace.kernel.netns import NetworkNamespace
from kptrace.model.errors import CompileError, KernelError, KptraceError, PrivilegeError, UnsupportedError
from kptrace.model.signal import MechanismState, Source, State
from kptrace.signals.mechanisms import SLOW_FEATURES, judge_all

IDENTITY_POLL_SECONDS = 0.5
#: Without these nothing can be loaded or linked, and no namespace entered.
_NEEDED = (Capability.BPF, Capability.PERFMON, Capability.NET_ADMIN, Capability.SYS_ADMIN)

#: Every part there is. Those of one group are tried in this order.
PARTS: tuple[Part, ...] = (*lookup_parts.PARTS, *rewrite_parts.PARTS)


class Parts:
    """All sources of one daemon; `start` attaches them, `close` lets everything go."""

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
        netns = NetworkNamespace(settings.netns)
        self._stack.callback(netns.close)
        identity = Identity.open(
            IdentitySettings(
                level=Level(settings.identity),
                file=settings.identity_file,
                kubeconfig=settings.kubeconfig,
                node=settings.node_name,
            )
        )
        self._stack.callback(identity.close)
        self._node = Node(settings, loop, netns, identity, self._stack)
        self._unused = Unused()
        self._running: list[Running] = []
        self._failures: list[KptraceError] = []
        self.sources: list[Source] = [identity, self._unused]
        self.from_cache = True
        self._started = False

    @property
    def ready(self) -> bool:
        """Whether what can be attached is attached. Names may come later: a lost API server changes nothing."""
        return self._started

    def states(self) -> list[MechanismState]:
        """Every mechanism's state."""
        return [state for source in self.sources for state in source.states()]

    def losses(self) -> Mapping[tuple[str, str], int]:
        """Lost events by signal and reason."""
        totals = {("daemon", "callback_failed"): self._loop.failures}
        for source in self._running:
            totals.update(source.losses())
        return totals

    def sections(self) -> Mapping[str, object]:
        """What /status shows besides the states."""
        losses = {f"{signal}/{reason}": count for (signal, reason), count in self.losses().items()}
        sections: dict[str, object] = {
            "netns": str(self._settings.netns or "own"),
            "compiled from cache": self.from_cache,
        }
        for source in self._running:
            sections.update(source.status(names=self._settings.status_names))
        return {**sections, "losses": losses}

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
        candidates = [part for part in self._parts if self._wanted(part, states)]
        while candidates:
            # At most one of each group at a time: where it works, the others are not even compiled.
            first = {part.group: part for part in reversed(candidates)}
            started = self._start_each([part for part in candidates if part is first[part.group]])
            candidates = [
                part for part in candidates if part is not first[part.group] and part.group not in started
            ]
        if not self._running and self._failures:
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
        rest = frozenset(states) - {(row.signal, row.mechanism) for s in self._running for row in s.states()}
        threading.Thread(target=self._probe_rest, args=[rest], name="kptrace-probe", daemon=True).start()
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
            row = MechanismState(part.signal, part.mechanism, State.OFF, "disabled", disabled)
            self._unused.add([row])
            return False
        known = states[part.signal, part.mechanism]
        if known.state is State.UNAVAILABLE:
            self._unavailable(part, known.reason, UnsupportedError(known.detail))
            return False
        return True

    def _start_each(self, parts: list[Part]) -> set[str]:
        """Compile together, start one after the other; return the groups of those that run."""
        compiler = Compiler(self._settings.host.vmlinux_btf, self._settings.cache_dir)
        answers = compiler.build_each([part.request for part in parts])
        self.from_cache = self.from_cache and compiler.from_cache
        running = set()
        for part, answer in zip(parts, answers, strict=True):
            if not isinstance(answer, Bytecode):
                reason = "compile_failed" if isinstance(answer, CompileError) else "btf_lacking"
                self._unavailable(part, reason, answer)
            elif self._start_one(part, answer):
                running.add(part.group)
        return running

    def _start_one(self, part: Part, code: Bytecode) -> bool:
        with ExitStack() as own:
            try:
                source = part.start(replace(self._node, stack=own), code)
            except UnsupportedError as error:
                self._unavailable(part, "unsupported", error)
                return False
            except (KernelError, PrivilegeError) as error:
                # All capabilities are there (`_probe`): it is the kernel that does not let anybody do this.
                self._unavailable(part, "attach_refused", error)
                return False
            self._stack.push(own.pop_all())
        self._unused.rows = {
            key: row for key, row in self._unused.rows.items() if key != (part.signal, part.mechanism)
        }
        self._running.append(source)
        self.sources.append(source)
        return True

    def _unavailable(self, part: Part, reason: str, error: KptraceError) -> None:
        """Go on without a mechanism; its state says why.

        Raises:
            CompileError: BCC cannot compile what the user asked for.
            UnsupportedError: the user asked for just this mechanism.
        """
        if part.alternative and self._settings.lookup_mechanism == part.mechanism:
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

    def _probe_rest(self, rest: frozenset[tuple[str, str]]) -> None:
        """Find out about the mechanisms that are not in use, beside the running signals."""
        try:
            fresh = judge_all(probe(self._settings.host))
        except KptraceError as error:
            self._log.warning("probe_failed", error=str(error))
            return
        self._loop.call_soon_threadsafe(
            lambda: self._unused.add(
                row
                for row in fresh
                if (row.signal, row.mechanism) in rest
                # What was found while starting says more than the probe.
                and self._unused.rows[row.signal, row.mechanism].state is State.ACTIVE
            )
        )

    def close(self) -> None:
        """Detach and free everything, in reverse order. Idempotent."""
        self._stack.close()
