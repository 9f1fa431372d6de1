# SPDX-License-Identifier: Apache-2.0
"""The drift signal as a part of the daemon."""

from kptrace.daemon.part import Node, Part, Running
from kptrace.daemon.settings import programming_off
from kptrace.kernel.bytecode import Bytecode
from kptrace.signals.drift_signal import DriftSignal


def _start(node: Node, _code: Bytecode) -> Running:
    signal = DriftSignal(node.netns, node.identity, node.loop, after_seconds=node.settings.drift_after)
    node.stack.callback(signal.close)
    node.shared.explain.append(signal.explain)
    signal.start()
    return signal


#: It needs the same names as the programming signal.
PARTS = (Part("drift", "netlink", None, _start, programming_off),)
