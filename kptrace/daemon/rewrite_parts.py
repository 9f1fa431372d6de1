# SPDX-License-Identifier: Apache-2.0
"""The rewrite signal as a part of the daemon."""

from kptrace.daemon.part import Node, Part, Running
from kptrace.kernel.bytecode import Bytecode
from kptrace.model.rewrite import Rewrite
from kptrace.signals.rewrite import Options, RewriteSignal
from kptrace.signals.rewrite_kernel import REQUEST
from kptrace.signals.writers import parse_writer


def _start(node: Node, code: Bytecode) -> Running:
    def committed(rewrite: Rewrite) -> None:
        for listener in node.committed:
            listener(rewrite)

    options = Options(writers=tuple(parse_writer(text) for text in node.settings.writers))
    rewrite = RewriteSignal(code, node.netns, node.loop, node.settings.host, committed, options)
    node.stack.callback(rewrite.close)
    rewrite.start()
    return rewrite


PARTS = (
    Part(
        "rewrite",
        "tracepoint",
        REQUEST,
        _start,
        lambda settings: "" if settings.rewrites else "--no-rewrites",
    ),
)
