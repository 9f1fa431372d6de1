# SPDX-License-Identifier: Apache-2.0
"""The lookup signal's mechanisms as parts of the daemon, in the order in which `auto` tries them (docs/adr/0006)."""

from collections.abc import Callable

from kptrace.daemon.loop import Loop
from kptrace.daemon.part import Node, Part, Running
from kptrace.daemon.settings import Settings
from kptrace.dataplanes.installed import InstalledChains
from kptrace.kernel.bytecode import Bytecode
from kptrace.kernel.compile import Request
from kptrace.model.netfilter import DataPlane
from kptrace.model.rewrite import Rewrite
from kptrace.signals.lookup import LookupSignal, Options
from kptrace.signals.lookup_function import FunctionLookup
from kptrace.signals.lookup_function_kernel import REQUESTS, Mechanism
from kptrace.signals.lookup_kernel import REQUEST, LookupKernel
from kptrace.signals.rewrite_reduce import BASE_CHAINS


class _Follow:
    """Looks for base chains that came or went, once after any number of rewrites: a flood of them plans nothing twice."""

    def __init__(self, loop: Loop, lookup: LookupSignal, chains: InstalledChains) -> None:
        self._loop = loop
        self._lookup = lookup
        self._chains = chains
        self._due = False

    def __call__(self, rewrite: Rewrite) -> None:
        """A rewrite was committed."""
        if rewrite.dataplane is not DataPlane.IPTABLES_LEGACY and BASE_CHAINS not in rewrite.details:
            self._chains.acknowledge(rewrite.generation)
        elif not self._due:
            self._due = True
            self._loop.call_later(0.0, self._look)

    def _look(self) -> None:
        self._due = False
        self._lookup.notice_rewrite()


def _start_bracket(node: Node, code: Bytecode) -> Running:
    settings = node.settings
    kernel = LookupKernel(code, settings.host)
    node.stack.callback(kernel.close)
    chains = node.stack.enter_context(InstalledChains(node.netns, settings.host))
    options = Options(settings.sampling, settings.overhead_budget, settings.brackets_with_nfqueue)
    lookup = LookupSignal(kernel, node.netns, chains, node.loop, options)
    node.stack.callback(lookup.close)
    lookup.start()
    node.identity.subscribe(lookup.set_identity)
    lookup.set_identity(node.identity.snapshot())

    node.shared.explain.append(lookup.explain)
    node.shared.committed.append(_Follow(node.loop, lookup, chains))
    return lookup


def _disabled(settings: Settings, mechanism: str) -> str:
    wanted = settings.lookup_mechanism
    return "" if wanted in ("auto", mechanism) else f"--lookup-mechanism={wanted}"


def _start_functions(mechanism: Mechanism) -> Callable[[Node, Bytecode], Running]:
    def start(node: Node, code: Bytecode) -> Running:
        settings = node.settings
        options = Options(settings.sampling, settings.overhead_budget)
        lookup = FunctionLookup(code, mechanism, node.netns, settings.host, node.loop, options)
        node.stack.callback(lookup.close)
        lookup.start()
        return lookup

    return start


def _part(mechanism: str, request: Request, start: Callable[[Node, Bytecode], Running]) -> Part:
    return Part(
        "lookup",
        mechanism,
        request,
        start,
        lambda settings: _disabled(settings, mechanism),
        alternative=True,
    )


PARTS = (
    _part("bracket", REQUEST, _start_bracket),
    _part("fentry", REQUESTS["fentry"], _start_functions("fentry")),
    _part("kprobe", REQUESTS["kprobe"], _start_functions("kprobe")),
)
