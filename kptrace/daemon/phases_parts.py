# SPDX-License-Identifier: Apache-2.0
"""The phases inside rewrites as parts of the daemon: by fentry, or by kprobes where that does not work."""

from collections.abc import Callable

from kptrace.daemon.part import Node, Part, Running
from kptrace.daemon.settings import Settings
from kptrace.kernel.bytecode import Bytecode
from kptrace.kernel.functions import MECHANISMS, Mechanism
from kptrace.signals.rewrite_phases import TICK_SECONDS, RewritePhases
from kptrace.signals.rewrite_phases_kernel import REQUESTS


def _start(mechanism: Mechanism) -> Callable[[Node, Bytecode], Running]:
    def start(node: Node, code: Bytecode) -> Running:
        phases = RewritePhases(code, mechanism, node.netns, node.settings.host)
        node.stack.callback(phases.close)
        phases.start()
        node.loop.call_soon_threadsafe(lambda: _follow(node, phases))
        return phases

    return start


def _follow(node: Node, phases: RewritePhases) -> None:
    node.loop.call_every(TICK_SECONDS, phases.tick)


def _disabled(settings: Settings) -> str:
    return "" if settings.rewrites else "--no-rewrites"


#: To read the modules' BTF and to attach to eight functions takes a second, and no other signal needs them.
PARTS = tuple(
    Part(
        "rewrite_phases",
        mechanism,
        REQUESTS[mechanism],
        _start(mechanism),
        _disabled,
        alternative=True,
        late=True,
    )
    for mechanism in MECHANISMS
)
