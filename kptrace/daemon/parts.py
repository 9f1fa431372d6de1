# SPDX-License-Identifier: Apache-2.0
"""The sources that one daemon runs: which signals this kernel and the settings allow, made and connected."""

import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace

import structlog

from kptrace.daemon.loop import Loop
from kptrace.daemon.settings import Settings
from kptrace.dataplanes.installed import InstalledChains
from kptrace.identity.resources import Level
from kptrace.identity.source import Identity, IdentitySettings
from kptrace.kernel.bytecode import Bytecode
from kptrace.kernel.capabilities import Capability, effective_capabilities, missing_capabilities
from kptrace.kernel.compile import Compiler, Request
from kptrace.kernel.features import TABLE, probe
from kptrace.kernel.netns import NetworkNamespace
from kptrace.model.errors import CompileError, KernelError, PrivilegeError, UnsupportedError
from kptrace.model.metrics import MetricFamily, MetricSpec
from kptrace.model.netfilter import DataPlane
from kptrace.model.rewrite import Rewrite
from kptrace.model.signal import MechanismState, Source, State
from kptrace.signals.lookup import LookupSignal, Options
from kptrace.signals.lookup_kernel import REQUEST as LOOKUP_REQUEST
from kptrace.signals.lookup_kernel import LookupKernel
from kptrace.signals.mechanisms import SLOW_FEATURES, judge_all
from kptrace.signals.rewrite import Options as RewriteOptions
from kptrace.signals.rewrite import RewriteSignal
from kptrace.signals.rewrite_kernel import REQUEST as REWRITE_REQUEST
from kptrace.signals.rewrite_reduce import BASE_CHAINS
from kptrace.signals.writers import parse_writer

IDENTITY_POLL_SECONDS = 0.5
#: Without these nothing can be loaded or linked, and no namespace entered.
_NEEDED = (Capability.BPF, Capability.PERFMON, Capability.NET_ADMIN, Capability.SYS_ADMIN)


class Missing:
    """Mechanisms that this node cannot use, or was told not to: they have states and no samples.

    Attributes:
        rows: the states; replaced as a whole.
    """

    name = "mechanisms"

    def __init__(self, rows: tuple[MechanismState, ...]) -> None:
        """A source with nothing but states."""
        self.rows = rows

    def describe(self) -> Sequence[MetricSpec]:
        """See `Source`."""
        return ()

    def families(self) -> Iterable[MetricFamily]:
        """See `Source`."""
        return ()

    def states(self) -> Sequence[MechanismState]:
        """See `Source`."""
        return self.rows


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
        self._unused = Missing(())
        self.sources: list[Source] = [self.identity, self._unused]
        self.from_cache = False
        self._started = False
        self.lookup: LookupSignal | None = None
        self.rewrite: RewriteSignal | None = None
        self._chains: InstalledChains | None = None

    @property
    def ready(self) -> bool:
        """Whether what can be attached is attached. Names may come later: a lost API server changes nothing."""
        return self._started

    def states(self) -> list[MechanismState]:
        """Every mechanism's state."""
        return [state for source in self.sources for state in source.states()]

    def losses(self) -> Mapping[tuple[str, str], int]:
        """Lost events by signal and reason."""
        rewrites = self.rewrite.losses() if self.rewrite is not None else {}
        return {("daemon", "callback_failed"): self._loop.failures, **rewrites}

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
        states = {(state.signal, state.mechanism): state for state in self._probe()}
        bracket, tracepoint = states.pop(("lookup", "bracket")), states.pop(("rewrite", "tracepoint"))
        if self._settings.lookup_mechanism == "off":
            bracket = replace(bracket, state=State.OFF, reason="disabled", detail="--lookup-mechanism=off")
        if not self._settings.rewrites:
            tracepoint = replace(tracepoint, state=State.OFF, reason="disabled", detail="--no-rewrites")
        codes = self._compile({bracket: LOOKUP_REQUEST, tracepoint: REWRITE_REQUEST})
        if bracket in codes:
            self._start_lookup(codes[bracket])
        if tracepoint in codes:
            self._start_rewrite(codes[tracepoint])
        self._unused.rows += tuple(states.values())
        rest = frozenset(states)
        threading.Thread(target=self._probe_rest, args=[rest], name="kptrace-probe", daemon=True).start()
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
        quick = [feature for feature in TABLE if feature.name not in SLOW_FEATURES]
        states = judge_all(probe(self._settings.host, table=quick))
        wanted = next((s for s in states if s.mechanism == self._settings.lookup_mechanism), None)
        if wanted is not None and wanted.state is State.UNAVAILABLE:
            raise UnsupportedError(
                f"look-ups cannot be measured by {wanted.mechanism}: {wanted.detail}",
                remedy="use --lookup-mechanism=auto",
            )
        return states

    def _probe_rest(self, rest: frozenset[tuple[str, str]]) -> None:
        """Find out about the mechanisms that are not in use, beside the running signals."""
        fresh = {(s.signal, s.mechanism): s for s in judge_all(probe(self._settings.host))}

        def publish() -> None:
            old = (row for row in self._unused.rows if (row.signal, row.mechanism) not in rest)
            self._unused.rows = (*old, *(fresh[key] for key in sorted(rest)))

        self._loop.call_soon_threadsafe(publish)

    def _compile(self, wanted: Mapping[MechanismState, Request]) -> dict[MechanismState, Bytecode]:
        """Compile for the mechanisms that can be had; the others become sources that say why not."""
        requests = {state: request for state, request in wanted.items() if state.state is State.ACTIVE}
        self._unused.rows += tuple(state for state in wanted if state not in requests)
        compiler = Compiler(self._settings.host.sys / "kernel/btf/vmlinux", self._settings.cache_dir)
        found = {}
        for state, answer in zip(requests, compiler.build_each(list(requests.values())), strict=True):
            if isinstance(answer, CompileError):
                self._unavailable(state.signal, state.mechanism, "compile_failed", answer)
            else:
                found[state] = answer
        self.from_cache = compiler.from_cache
        return found

    def _start_rewrite(self, code: Bytecode) -> None:
        try:
            rewrite = RewriteSignal(
                code,
                self.netns,
                self._loop,
                self._settings.host,
                self._committed,
                RewriteOptions(writers=tuple(parse_writer(text) for text in self._settings.writers)),
            )
            self._stack.callback(rewrite.close)
            rewrite.start()
        except (KernelError, UnsupportedError) as error:
            self._unavailable("rewrite", "tracepoint", "attach_refused", error)
            return
        self.rewrite = rewrite
        self.sources.append(rewrite)

    def _committed(self, rewrite: Rewrite) -> None:
        """A transaction of the watched namespace is in the kernel: follow it where it matters, and only there."""
        if self.lookup is None or self._chains is None:
            return
        if rewrite.dataplane is not DataPlane.IPTABLES_LEGACY and BASE_CHAINS not in rewrite.details:
            self._chains.acknowledge(rewrite.generation)
        else:
            self.lookup.tick()

    def _start_lookup(self, code: Bytecode) -> None:
        settings = self._settings
        try:
            kernel = LookupKernel(code, self._settings.host)
        except KernelError as error:
            if error.errno == 1:
                raise PrivilegeError(
                    f"the kernel refuses BPF maps: {error}", remedy="run as root, or grant CAP_BPF"
                ) from error
            self._unavailable("lookup", "bracket", "maps_refused", error)
            return
        self._stack.callback(kernel.close)
        self._chains = self._stack.enter_context(InstalledChains(self.netns))
        lookup = LookupSignal(
            kernel,
            self.netns,
            self._chains,
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
        """Go on without a mechanism; its state says why.

        Raises:
            UnsupportedError: the user asked for just this mechanism.
        """
        if self._settings.lookup_mechanism == mechanism:
            raise UnsupportedError(
                f"look-ups cannot be measured by {mechanism}: {error}", remedy="use --lookup-mechanism=auto"
            ) from error
        self._log.error(
            "signal_unavailable", signal=signal, mechanism=mechanism, reason=reason, error=str(error)
        )
        self._unused.rows += (MechanismState(signal, mechanism, State.UNAVAILABLE, reason, str(error)),)

    def close(self) -> None:
        """Detach and free everything, in reverse order. Idempotent."""
        self._stack.close()
