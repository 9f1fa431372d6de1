# SPDX-License-Identifier: Apache-2.0
"""What the daemon is made of: one part per signal and mechanism, and the node that they share."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Protocol

from kptrace.daemon.loop import Loop
from kptrace.daemon.settings import Settings
from kptrace.identity.source import Identity
from kptrace.kernel.bytecode import Bytecode
from kptrace.kernel.compile import Request
from kptrace.kernel.netns import NetworkNamespace
from kptrace.model.metrics import MetricFamily, MetricSpec
from kptrace.model.rewrite import Rewrite
from kptrace.model.signal import MechanismState, Source
from kptrace.signals.processes import ProcessTable


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
        processes: who runs, up to now; None where nobody follows that.
        consume_rewrites: takes in every rewrite up to now.
    """

    committed: list[Callable[[Rewrite], None]] = field(default_factory=list)
    rewritten: list[Callable[[Rewrite], None]] = field(default_factory=list)
    processes: Callable[[], ProcessTable] | None = None
    consume_rewrites: Callable[[], None] = lambda: None


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
        request: what the compile child makes for it.
        start: attaches it; raises KernelError or UnsupportedError where this kernel refuses.
        disabled: the setting that switches it off, as a user would write it, or nothing.
        alternative: whether it is one of several ways to measure the same: the first that works is taken.
    """

    signal: str
    mechanism: str
    request: Request
    start: Callable[[Node, Bytecode], Running]
    disabled: Callable[[Settings], str] = lambda _: ""
    alternative: bool = False

    @property
    def group(self) -> str:
        """Parts of one group are tried in their order until one works."""
        return self.signal if self.alternative else f"{self.signal}/{self.mechanism}"


class Unused:
    """Mechanisms that are not in use on this node: they have states and no samples.

    Attributes:
        rows: the states by (signal, mechanism); replaced as a whole.
    """

    name = "mechanisms"

    def __init__(self) -> None:
        """None yet."""
        self.rows: Mapping[tuple[str, str], MechanismState] = {}

    def add(self, states: Iterable[MechanismState]) -> None:
        """Publish these rows, each in place of what was said of the mechanism before."""
        self.rows = {**self.rows, **{(state.signal, state.mechanism): state for state in states}}

    def describe(self) -> Sequence[MetricSpec]:
        """See `Source`."""
        return ()

    def families(self) -> Iterable[MetricFamily]:
        """See `Source`."""
        return ()

    def states(self) -> Sequence[MechanismState]:
        """See `Source`."""
        return list(self.rows.values())
