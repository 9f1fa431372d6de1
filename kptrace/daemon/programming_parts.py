# SPDX-License-Identifier: Apache-2.0
"""The programming signal as a part of the daemon: it joins what the identity's watches and the rewrite signals know."""

from kptrace.daemon.part import Node, Part, Running
from kptrace.daemon.settings import programming_off
from kptrace.kernel.bytecode import Bytecode
from kptrace.model.errors import UnsupportedError
from kptrace.signals.programming_signal import ProgrammingSignal


def _start(node: Node, _code: Bytecode) -> Running:
    sync, losses = node.shared.sync, node.shared.rewrite_losses
    if sync is None or losses is None:
        raise UnsupportedError(
            "the rewrite and sync signals do not run: nothing tells when a change is committed"
        )
    datapath = node.shared.datapath
    signal = ProgrammingSignal(
        sync,
        lambda: node.identity.followed,
        node=node.settings.node_name,
        lost=lambda: sum(losses().values()),
        record=node.shared.recorder.change,
        replaced=lambda: datapath is not None and datapath.programs_services,
    )
    node.shared.written.append(signal.written)
    node.shared.synced.append(signal.synced)
    node.shared.settled.append(signal.settled)
    node.shared.explain.append(signal.explain)
    node.identity.follow(signal.difference)
    return signal


#: After those of the rewrites.
PARTS = (Part("programming", "watch", None, _start, programming_off),)
