# SPDX-License-Identifier: Apache-2.0
"""Parts that nothing waits for: compiled and attached in a thread of their own once the daemon is ready.

What they need of the kernel is slow to find out, slow to attach to, or both; meanwhile the other signals measure.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

import structlog

from kptrace.daemon.part import Node, Part, Running
from kptrace.kernel.bytecode import Bytecode
from kptrace.kernel.compile import Compiler
from kptrace.kernel.features import probe
from kptrace.model.errors import KptraceError
from kptrace.model.signal import MechanismState, State
from kptrace.signals.mechanisms import judge_all

#: How long the daemon's end waits for what is just being attached.
CLOSE_SECONDS: Final = 5.0


@dataclass(frozen=True, slots=True)
class Listener:
    """Who hears what became of them, in the loop's thread.

    Attributes:
        probed: what this kernel can do for every mechanism, all features probed; told first, unless that failed.
        started: a part runs.
        refused: a part does not, and why.
    """

    probed: Callable[[Sequence[MechanismState]], None]
    started: Callable[[Part, Running], None]
    refused: Callable[[Part, KptraceError], None]


class LateParts:
    """Probes everything, then starts the late parts in their order; of a group the first that works."""

    def __init__(self, node: Node, parts: Sequence[Part], listener: Listener) -> None:
        """Nothing happens before `start`.

        Args:
            node: what parts get, but for the stack.
            parts: those to start; each is started in this object's thread.
            listener: see `Listener`.
        """
        self._node = node
        self._parts = parts
        self._listener = listener
        self._log = structlog.get_logger()
        self._compiler = Compiler(node.settings.host.vmlinux_btf, node.settings.cache_dir)
        self._stack = ExitStack()
        self._closing = threading.Event()
        # Held while a part is compiled and attached: the end waits for that, but not for probes, which leave nothing.
        self._attaching = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="kptrace-late", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def _tell(self, what: Callable[[], None]) -> None:
        self._node.loop.call_soon_threadsafe(what)

    def _run(self) -> None:
        states: Mapping[tuple[str, str], MechanismState] = {}
        try:
            fresh = judge_all(probe(self._node.settings.host))
        except KptraceError as error:
            # What needs a feature that is missing fails by itself, and says why.
            self._log.warning("probe_failed", error=str(error))
        else:
            states = {(row.signal, row.mechanism): row for row in fresh}
            self._tell(partial(self._listener.probed, fresh))
        running: set[str] = set()
        for part in self._parts:
            known = states.get((part.signal, part.mechanism))
            if part.group in running or (known is not None and known.state is State.UNAVAILABLE):
                continue
            with self._attaching:
                if self._closing.is_set():
                    return
                try:
                    source = self._start(part)
                except KptraceError as error:
                    self._tell(partial(self._listener.refused, part, error))
                else:
                    running.add(part.group)
                    self._tell(partial(self._listener.started, part, source))

    def _start(self, part: Part) -> Running:
        code = Bytecode({}, {}, {}) if part.request is None else self._compiler.build(part.request)
        with ExitStack() as own:
            source = part.start(replace(self._node, stack=own), code)
            self._stack.push(own.pop_all())
        return source

    def close(self) -> None:
        """Let everything go that was started. Idempotent."""
        self._closing.set()
        self._compiler.abandon()
        if not self._attaching.acquire(timeout=CLOSE_SECONDS):
            # It goes with the process, as everything does that it has attached.
            self._log.warning("late_parts_still_starting")
            return
        try:
            self._stack.close()
        finally:
            self._attaching.release()
