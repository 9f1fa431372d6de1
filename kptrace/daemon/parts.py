# SPDX-License-Identifier: Apache-2.0
"""The sources that one daemon runs: which signals this kernel and the settings allow, made and connected."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack

import structlog

from kptrace.daemon.loop import Loop
from kptrace.daemon.settings import Settings
from kptrace.dataplanes.installed import InstalledChains
from kptrace.identity.resources import Level
from kptrace.identity.source import Identity, IdentitySettings
from kptrace.kernel.bytecode import Bytecode
from kptrace.kernel.capabilities import Capability, effective_capabilities, missing_capabilities
from kptrace.kernel.compile import Compiler
from kptrace.kernel.features import probe
from kptrace.kernel.netns import NetworkNamespace
from kptrace.model.errors import CompileError, KernelError, PrivilegeError, UnsupportedError
from kptrace.model.metrics import MetricFamily, MetricSpec
from kptrace.model.signal import MechanismState, Source, State
from kptrace.signals.lookup import LookupSignal, Options
from kptrace.signals.lookup_kernel import REQUEST as LOOKUP_REQUEST
from kptrace.signals.lookup_kernel import LookupKernel
from kptrace.signals.mechanisms import judge_all

IDENTITY_POLL_SECONDS = 0.5
#: Without these nothing can be loaded or linked, and no namespace entered.
_NEEDED = (Capability.BPF, Capability.PERFMON, Capability.NET_ADMIN, Capability.SYS_ADMIN)


class Missing:
    """A signal that this node cannot measure, or was told not to: it has a state and no samples."""

    def __init__(self, state: MechanismState) -> None:
        """A source with nothing but its state."""
        self.name = state.signal
        self._state = state

    def describe(self) -> Sequence[MetricSpec]:
        """See `Source`."""
        return ()

    def families(self) -> Iterable[MetricFamily]:
        """See `Source`."""
        return ()

    def states(self) -> Sequence[MechanismState]:
        """See `Source`."""
        return (self._state,)


class Parts:
    """All sources of one daemon; `start` attaches them, `close` lets everything go."""

    def __init__(self, settings: Settings, loop: Loop) -> None:
        """Open the namespace and the names: what a user may have got wrong is said before anything is attached.

        Raises:
            UsageError, ManifestError: the settings lead nowhere.
        """
        self._settings = settings
        self._loop = loop
        self._log = structlog.get_logger()
        self._stack = ExitStack()
        self.netns = NetworkNamespace(settings.netns)
        self._stack.callback(self.netns.close)
        self.identity = Identity.open(
            IdentitySettings(
                level=Level(settings.identity),
                file=settings.identity_file,
                kubeconfig=settings.kubeconfig,
                node=settings.node_name,
            )
        )
        self._stack.callback(self.identity.close)
        self.sources: list[Source] = [self.identity]
        self.from_cache = False
        self._started = False
        self.lookup: LookupSignal | None = None

    @property
    def ready(self) -> bool:
        """Whether what can be attached is attached. Names may come later: a lost API server changes nothing."""
        return self._started

    def states(self) -> list[MechanismState]:
        """Every mechanism's state."""
        return [state for source in self.sources for state in source.states()]

    def losses(self) -> Mapping[tuple[str, str], int]:
        """Lost events by signal and reason, of the daemon's own loop."""
        return {("daemon", "callback_failed"): self._loop.failures}

    def sections(self) -> Mapping[str, object]:
        """What /status shows besides the states."""
        losses = {f"{signal}/{reason}": count for (signal, reason), count in self.losses().items()}
        return {
            "losses": losses,
            "compiled_from_cache": self.from_cache,
            "netns": str(self._settings.netns or "own"),
        }

    def start(self) -> None:
        """Compile, attach and begin; names from a file are known when this returns.

        Raises:
            PrivilegeError: the kernel lets this process load nothing.
            ManifestError: the identity file cannot be understood.
        """
        self.identity.start()
        states = self._probe()
        self._start_lookup(next(state for state in states if state.mechanism == "bracket"))
        others = (state for state in states if state.signal == "lookup" and state.mechanism != "bracket")
        self.sources += [Missing(state) for state in others]
        self._loop.call_every(IDENTITY_POLL_SECONDS, self.identity.poll)
        self._started = True

    def _probe(self) -> list[MechanismState]:
        """What this kernel can do for each mechanism.

        Raises:
            PrivilegeError: a capability is missing without which nothing can be measured.
            UnsupportedError: the mechanism that was asked for cannot be had.
        """
        missing = missing_capabilities(effective_capabilities(self._settings.host), _NEEDED)
        if missing:
            raise PrivilegeError(
                f"missing {', '.join(map(str, missing))}", remedy="run as root, or grant these capabilities"
            )
        states = judge_all(probe(self._settings.host))
        wanted = next((s for s in states if s.mechanism == self._settings.lookup_mechanism), None)
        if wanted is not None and wanted.state is State.UNAVAILABLE:
            raise UnsupportedError(
                f"look-ups cannot be measured by {wanted.mechanism}: {wanted.detail}",
                remedy="use --lookup-mechanism=auto",
            )
        return states

    def _compile(self) -> Bytecode | None:
        compiler = Compiler(self._settings.host.sys / "kernel/btf/vmlinux", self._settings.cache_dir)
        try:
            code = compiler.build([LOOKUP_REQUEST])
        except (CompileError, OSError) as error:
            self._unavailable("lookup", "bracket", "compile_failed", error)
            return None
        self.from_cache = compiler.from_cache
        return code[0]

    def _start_lookup(self, state: MechanismState) -> None:
        settings = self._settings
        if settings.lookup_mechanism == "off":
            state = MechanismState("lookup", "bracket", State.OFF, "disabled", "--lookup-mechanism=off")
        if state.state is not State.ACTIVE:
            self.sources.append(Missing(state))
            return
        code = self._compile()
        if code is None:
            return
        try:
            kernel = LookupKernel(code)
        except KernelError as error:
            if error.errno == 1:
                raise PrivilegeError(
                    f"the kernel refuses BPF maps: {error}", remedy="run as root, or grant CAP_BPF"
                ) from error
            self._unavailable("lookup", "bracket", "maps_refused", error)
            return
        self._stack.callback(kernel.close)
        lookup = LookupSignal(
            kernel,
            self.netns,
            self._stack.enter_context(InstalledChains(self.netns)),
            self._loop,
            Options(settings.sampling, settings.overhead_budget, settings.brackets_with_nfqueue),
        )
        try:
            lookup.start()
        except (KernelError, UnsupportedError) as error:
            lookup.close()
            self._unavailable("lookup", "bracket", "attach_refused", error)
            return
        self._stack.callback(lookup.close)
        self.identity.subscribe(lookup.set_identity)
        lookup.set_identity(self.identity.snapshot())
        self.lookup = lookup
        self.sources.append(lookup)

    def _unavailable(self, signal: str, mechanism: str, reason: str, error: Exception) -> None:
        self._log.error(
            "signal_unavailable", signal=signal, mechanism=mechanism, reason=reason, error=str(error)
        )
        self.sources.append(Missing(MechanismState(signal, mechanism, State.UNAVAILABLE, reason, str(error))))

    def close(self) -> None:
        """Detach and free everything, in reverse order. Idempotent."""
        self._stack.close()
