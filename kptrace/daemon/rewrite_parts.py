# SPDX-License-Identifier: Apache-2.0
"""The signals around rewrites as parts of the daemon."""

import time

from kptrace.daemon.part import Node, Part, Running
from kptrace.daemon.settings import Settings
from kptrace.kernel.bytecode import Bytecode
from kptrace.model.rewrite import Rewrite
from kptrace.signals.process_kernel import REQUEST as PROCESS_REQUEST
from kptrace.signals.process_watch import ProcessWatch
from kptrace.signals.rewrite import Options, RewriteSignal
from kptrace.signals.rewrite_kernel import REQUEST
from kptrace.signals.rewrite_requests_records import Requests, Subsystem
from kptrace.signals.sync_events import Phase, Sync
from kptrace.signals.sync_signal import SyncSignal
from kptrace.signals.writers import WriterRule, Writers, parse_writer
from kptrace.signals.xtables_lock import Options as LockOptions
from kptrace.signals.xtables_lock import XtablesLockSignal
from kptrace.signals.xtables_lock_kernel import REQUEST as LOCK_REQUEST
from kptrace.signals.xtables_lock_records import LockState

SYNC_TICK_SECONDS = 0.5


def _start(node: Node, code: Bytecode) -> Running:
    def committed(rewrite: Rewrite) -> None:
        for listener in node.shared.committed:
            listener(rewrite)

    def rewritten(rewrite: Rewrite) -> None:
        for listener in node.shared.rewritten:
            listener(rewrite)

    def written(rewrite: Rewrite, data: bytes) -> None:
        for listener in node.shared.written:
            listener(rewrite, data)

    def asked(requests: Requests) -> None:
        if node.shared.sync is not None:
            asker = requests.asker
            phase = Phase.LIST if asker.subsystem is Subsystem.NFTABLES else Phase.CONNTRACK
            node.shared.sync.span(asker.tgid, phase, requests.begin_ns, requests.end_ns, asker.family)

    rewrite = RewriteSignal(
        code,
        node.netns,
        node.loop,
        node.settings.host,
        committed,
        Options(writers=_writers(node.settings)),
        node.shared.processes,
        rewritten,
        written,
        asked,
    )
    node.stack.callback(rewrite.close)
    rewrite.start()
    node.shared.consume_rewrites = rewrite.consume
    node.shared.rewrite_losses = lambda: {
        key: count for key, count in rewrite.losses().items() if key[0] == rewrite.name
    }
    return rewrite


def _start_sync(node: Node, code: Bytecode) -> Running:
    host = node.settings.host
    watch = ProcessWatch(code, host)
    node.stack.callback(watch.close)
    writers = Writers(_writers(node.settings))

    def synced(run: Sync) -> None:
        for listener in node.shared.synced:
            listener(run)

    sync = SyncSignal(
        node.netns.inode,
        lambda: watch.table,
        writers,
        host,
        synced,
        watch.losses,
        record=node.shared.recorder.sync,
    )

    def tick() -> None:
        until = time.monotonic_ns()
        node.shared.consume_rewrites()
        node.shared.consume_lock()
        watch.consume()
        sync.settle(until)
        for listener in node.shared.settled:
            listener(until)
        sync.tick()

    watch.start([sync.process])
    node.shared.processes = watch.consume
    node.shared.sync = sync
    node.shared.rewritten.append(sync.rewrite)
    node.loop.call_every(SYNC_TICK_SECONDS, tick)
    return sync


def _start_lock(node: Node, code: Bytecode) -> Running:
    def waited(state: LockState) -> None:
        if node.shared.sync is not None:
            node.shared.sync.span(state.tgid, Phase.LOCK_WAIT, state.begin_ns, state.end_ns)

    lock = XtablesLockSignal(
        code,
        node.netns,
        node.loop,
        node.settings.host,
        node.shared.processes,
        LockOptions(writers=_writers(node.settings), on_wait=waited),
    )
    node.stack.callback(lock.close)
    lock.start()
    node.shared.consume_lock = lock.consume
    return lock


def _writers(settings: Settings) -> tuple[WriterRule, ...]:
    return tuple(parse_writer(text) for text in settings.writers)


def _disabled(settings: Settings) -> str:
    return "" if settings.rewrites else "--no-rewrites"


#: In this order: the others know processes by the first.
PARTS = (
    Part("sync", "tracepoint", PROCESS_REQUEST, _start_sync, _disabled),
    Part("rewrite", "tracepoint", REQUEST, _start, _disabled),
    Part("xtables_lock", "tracepoint", LOCK_REQUEST, _start_lock, _disabled),
)
