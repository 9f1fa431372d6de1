# SPDX-License-Identifier: Apache-2.0
"""Keeps programs at the functions whose modules are there: they may come after the daemon, and go before it."""

import errno
import os
from collections.abc import Iterable, Mapping
from typing import Final

import structlog

from kptrace.kernel.btf import Btf, BtfMissing
from kptrace.kernel.functions import Function, describe
from kptrace.kernel.host import Host
from kptrace.kernel.modules import loaded_module
from kptrace.kernel.registers import registers
from kptrace.model.errors import KernelError, KptraceError
from kptrace.signals.rewrite_phases_kernel import HOOKS, Hook, PhasesKernel, destroy_holes

#: Built in: a module number that no module has.
_BUILT_IN: Final = 0


class PhasesFollower:
    """Attaches and detaches; what came of it is in `attached` and `refused`.

    Attributes:
        attached: functions that have programs, by the number of their module.
        refused: why a function that is there has none.
        missing: functions that their module does not have.
    """

    def __init__(self, kernel: PhasesKernel, host: Host) -> None:
        """Nothing is attached before `tick`."""
        self._kernel = kernel
        self._host = host
        self._log = structlog.get_logger(signal="rewrite_phases")
        self._tried: dict[Hook, int] = {}
        self._built_in: frozenset[Hook] | None = None
        self.attached: dict[Hook, int] = {}
        self.refused: dict[Hook, KptraceError] = {}
        self.missing: frozenset[Hook] = frozenset()

    def due(self) -> bool:
        """Whether `tick` has something to do: cheap."""
        return self._built_in is None or self._here() != self._tried

    def _here(self) -> dict[Hook, int]:
        loaded = {hook: loaded_module(self._host, hook.module) for hook in HOOKS}
        here = {hook: number for hook, number in loaded.items() if number is not None}
        return here | dict.fromkeys(self._built_in or (), _BUILT_IN)

    def tick(self) -> None:
        """Follow the modules. Reading their BTF and attaching takes tenths of a second, when one has come.

        Raises:
            BtfError: the kernel's own BTF cannot be read.
        """
        here = self._here()
        for hook in [hook for hook in self._tried if here.get(hook) != self._tried[hook]]:
            self._forget(hook)
        fresh = [hook for hook in HOOKS if hook in here and hook not in self._tried]
        if not fresh and self._built_in is not None:
            return
        kernel = Btf.load(self._host.vmlinux_btf)
        if self._built_in is None:
            found = [hook for hook in HOOKS if hook not in here and _has(kernel, hook.function)]
            self._built_in = frozenset(found)
            here |= dict.fromkeys(found, _BUILT_IN)
            fresh = [hook for hook in HOOKS if hook in here]
        self._attach(kernel, {hook: here[hook] for hook in fresh})

    def _forget(self, hook: Hook) -> None:
        self._kernel.detach(hook)
        self._tried.pop(hook, None)
        self.refused.pop(hook, None)
        self.missing -= {hook}
        if self.attached.pop(hook, None) is not None:
            self._log.info("function_detached", function=hook.function)

    def _attach(self, kernel: Btf, hooks: Mapping[Hook, int]) -> None:
        modules: dict[str, Btf] = {}
        for hook, number in hooks.items():
            self._tried[hook] = number
            try:
                if number and hook.module not in modules:
                    modules[hook.module] = self._module(kernel, hook.module)
                btf = modules.get(hook.module, kernel)
                self._kernel.attach(hook, self._describe(btf, hook, number), destroy_holes(btf))
            except BtfMissing:
                self.missing |= {hook}
            except KptraceError as error:
                if isinstance(error, KernelError) and error.errno == errno.ENOENT:
                    self.missing |= {hook}  # what a kprobe says
                    continue
                self.refused[hook] = error
                self._log.debug("function_refused", function=hook.function, error=str(error))
            else:
                self.attached[hook] = number
                self._log.info("function_attached", function=hook.function, mechanism=self._kernel.mechanism)

    def _module(self, kernel: Btf, name: str) -> Btf:
        path = self._host.module_btf(name)
        # Before Linux kernel commit 36e68442d1af ("bpf: Load and verify kernel module BTFs") (in v5.11) modules have none.
        return Btf.load(path, kernel) if path.exists() else kernel

    def _describe(self, btf: Btf, hook: Hook, number: int) -> Function:
        layout = registers(os.uname().machine) if self._kernel.mechanism == "kprobe" else None
        return describe(btf, hook.function, hook.module if number else "", layout)

    def hopeless(self) -> str:
        """Why nothing can be attached to, now or when modules come; empty where something may be."""
        if self.refused:
            return str(next(iter(self.refused.values())))
        if self.missing:
            return f"not to be found: {self.names(self.missing)}"
        described = self._host.vmlinux_btf.parent.glob("*")
        if self._kernel.mechanism == "fentry" and [path.name for path in described] == ["vmlinux"]:
            loaded = next(self._host.sys.glob("module/*/initstate"), None)
            return f"the module {loaded.parent.name} has no BTF" if loaded else ""
        return ""

    def pinned(self) -> tuple[str, ...]:
        """The modules that cannot be unloaded while these programs are attached."""
        if self._kernel.mechanism != "fentry":
            return ()
        return tuple(sorted({hook.module for hook, number in self.attached.items() if number != _BUILT_IN}))

    def names(self, hooks: Iterable[Hook]) -> str:
        """Functions as text."""
        return ", ".join(hook.function for hook in HOOKS if hook in frozenset(hooks))


def _has(kernel: Btf, name: str) -> bool:
    try:
        return bool(kernel.func_id(name))
    except BtfMissing:
        return False
