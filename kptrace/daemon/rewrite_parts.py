# SPDX-License-Identifier: Apache-2.0
"""The signals around rewrites as parts of the daemon."""

from kptrace.daemon.part import Node, Part, Running
from kptrace.daemon.settings import Settings
from kptrace.kernel.bytecode import Bytecode
from kptrace.model.rewrite import Rewrite
from kptrace.signals.rewrite import Options, RewriteSignal
from kptrace.signals.rewrite_kernel import REQUEST
from kptrace.signals.writers import WriterRule, parse_writer
from kptrace.signals.xtables_lock import Options as LockOptions
from kptrace.signals.xtables_lock import XtablesLockSignal
from kptrace.signals.xtables_lock_kernel import REQUEST as LOCK_REQUEST


def _start(node: Node, code: Bytecode) -> Running:
    def committed(rewrite: Rewrite) -> None:
        for listener in node.shared.committed:
            listener(rewrite)

    rewrite = RewriteSignal(
        code, node.netns, node.loop, node.settings.host, committed, Options(writers=_writers(node.settings))
    )
    node.stack.callback(rewrite.close)
    rewrite.start()
    node.shared.processes = rewrite.processes
    return rewrite


def _start_lock(node: Node, code: Bytecode) -> Running:
    lock = XtablesLockSignal(
        code,
        node.netns,
        node.loop,
        node.settings.host,
        node.shared.processes,
        LockOptions(writers=_writers(node.settings)),
    )
    node.stack.callback(lock.close)
    lock.start()
    return lock


def _writers(settings: Settings) -> tuple[WriterRule, ...]:
    return tuple(parse_writer(text) for text in settings.writers)


def _disabled(settings: Settings) -> str:
    return "" if settings.rewrites else "--no-rewrites"


#: In this order: the second knows processes by the first.
PARTS = (
    Part("rewrite", "tracepoint", REQUEST, _start, _disabled),
    Part("xtables_lock", "tracepoint", LOCK_REQUEST, _start_lock, _disabled),
)
