# SPDX-License-Identifier: Apache-2.0
"""Keeps programs at the functions that are there: modules come after the daemon, and go before it."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

import structlog

from kptrace.kernel.btf import BtfError
from kptrace.kernel.host import Host
from kptrace.kernel.support import Context
from kptrace.model.errors import KptraceError, UnsupportedError
from kptrace.model.signal import MechanismState, State
from kptrace.signals.lookup_function_kernel import FunctionKernel, Target
from kptrace.signals.lookup_function_layout import FUNCTIONS, Function
from kptrace.signals.lookup_function_targets import Found, find_targets, present

#: Built in: a module number that no module has.
_BUILT_IN: Final = 0


class FunctionFollower:
    """Owns what is attached; `tick` makes it follow the modules.

    Attributes:
        state: how far that succeeds now.
    """

    def __init__(self, kernel: FunctionKernel, host: Host, ready: Callable[[], None]) -> None:
        """Nothing is attached before `start`.

        Args:
            kernel: what attaches.
            host: where sysfs is.
            ready: asks for a `tick` soon, as a module's BTF was read; called from another thread.
        """
        self._kernel = kernel
        self._host = host
        self._ready = ready
        self._log = structlog.get_logger(signal="lookup")
        self._attached: dict[Function, int] = {}
        # What is known of each function, and for which number of its module that is.
        self._found: dict[Function, tuple[int, Found]] = {}
        self._built_in: frozenset[Function] = frozenset()
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kptrace-btf")
        self._reading: Future[dict[Function, Found]] | None = None
        self._asked: dict[Function, int] = {}
        self._closed = False
        self.state = self._row(State.OFF, "starting", "")

    @property
    def attached(self) -> tuple[Function, ...]:
        """What is attached now."""
        return tuple(self._attached)

    def start(self) -> None:
        """Attach to what is there.

        Raises:
            UnsupportedError: functions are there, and none can be attached to.
        """
        loaded = present(self._host, FUNCTIONS)
        asked = {function: loaded.get(function, _BUILT_IN) for function in FUNCTIONS}
        found = find_targets(self._host, self._kernel.mechanism, asked)
        self._built_in = frozenset(function for function in found if asked[function] == _BUILT_IN)
        self._found = {function: (asked[function], answer) for function, answer in found.items()}
        self.tick(attached=True)
        if self.state.state is State.UNAVAILABLE:
            raise UnsupportedError(
                f"{self.state.detail}; {Context(self._host).lockdown}", remedy="see 'kptrace check'"
            )

    def tick(self, *, attached: bool) -> None:
        """Follow the modules. Attaching may take until another tick: their BTF is read in another thread.

        Args:
            attached: whether anything is to be attached at all.
        """
        if self._closed:
            return
        if not attached:
            self._detach(tuple(self._attached))
            detail = "detached: the look-ups cost more than --overhead-budget"
            self.state = self._row(State.OFF, "over_budget", detail)
            return
        here = present(self._host, (each for each in FUNCTIONS if each not in self._built_in))
        here |= dict.fromkeys(self._built_in, _BUILT_IN)
        self._detach([each for each, number in self._attached.items() if here.get(each) != number])
        self._read(here)
        for function, number in here.items():
            if function not in self._attached and self._answer(function, number) is not None:
                self._attach(function, number)
        self.state = self._judge(here)

    def _answer(self, function: Function, number: int) -> Found | None:
        known, answer = self._found.get(function, (None, None))
        return answer if known == number else None

    def _read(self, here: dict[Function, int]) -> None:
        """Take what was read, and read what is new."""
        if self._reading is not None and self._reading.done():
            for function, answer in self._reading.result().items():
                self._found[function] = (self._asked[function], answer)
            self._reading = None
        unknown = {each: number for each, number in here.items() if self._answer(each, number) is None}
        if unknown and self._reading is None:
            self._asked = unknown
            self._reading = self._reader.submit(find_targets, self._host, self._kernel.mechanism, unknown)
            self._reading.add_done_callback(lambda _: self._ready())

    def _attach(self, function: Function, number: int) -> None:
        target = self._answer(function, number)
        if not isinstance(target, Target):
            return
        try:
            self._kernel.attach(target)
        except KptraceError as error:
            # Not tried again before the module is another one: the kernel would only refuse again.
            self._found[function] = (number, error)
            self._log.warning("function_refused", function=function.name, error=str(error))
            return
        self._attached[function] = number
        self._log.info("function_attached", function=function.name, mechanism=self._kernel.mechanism)

    def _detach(self, functions: "list[Function] | tuple[Function, ...]") -> None:
        for function in functions:
            self._kernel.detach(function)
            del self._attached[function]
            self._log.info("function_detached", function=function.name)

    def _judge(self, here: dict[Function, int]) -> MechanismState:
        refused = [
            answer
            for function, number in here.items()
            if isinstance(answer := self._answer(function, number), KptraceError)
        ]
        detail = "; ".join(f"{function.name}: {self._say(function, here)}" for function in FUNCTIONS)
        if refused:
            reason = "no_module_btf" if isinstance(refused[0], BtfError) else "attach_refused"
            # Without modules' BTF a kprobe still finds the functions whose modules may come; after fentry there is that.
            waits = self._kernel.mechanism == "kprobe" and any(function not in here for function in FUNCTIONS)
            hopeful = self._attached or (waits and all(isinstance(error, BtfError) for error in refused))
            return self._row(State.DEGRADED if hopeful else State.UNAVAILABLE, reason, detail)
        return self._row(State.ACTIVE, "ok" if self._attached else "waiting_for_module", detail)

    def _say(self, function: Function, here: dict[Function, int]) -> str:
        number = here.get(function)
        if number is None:
            return f"waits for the module {function.module}"
        if function in self._attached:
            pins = self._kernel.mechanism == "fentry" and number != _BUILT_IN
            return f"attached, pins the module {function.module}" if pins else "attached"
        answer = self._answer(function, number)
        return str(answer) if isinstance(answer, KptraceError) else "its BTF is being read"

    def _row(self, state: State, reason: str, detail: str) -> MechanismState:
        return MechanismState("lookup", self._kernel.mechanism, state, reason, detail)

    def end(self, reason: str, detail: str) -> None:
        """Detach for good, and say why."""
        self.close()
        self.state = self._row(State.OFF, reason, detail)

    def close(self) -> None:
        """Detach everything. Idempotent."""
        if not self._closed:
            self._closed = True
            self._detach(tuple(self._attached))
            self._reader.shutdown(wait=True)
