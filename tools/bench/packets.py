# SPDX-License-Identifier: Apache-2.0
"""What a bracket costs a packet."""

import os
import random
import statistics
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from figures import Figure

from kptrace.dataplanes.installed import InstalledChains
from kptrace.experiments.netns import Namespace
from kptrace.kernel.attach import attach_netfilter
from kptrace.kernel.bytecode import Bytecode, link
from kptrace.kernel.load import AttachType, ProgramType, load_program
from kptrace.kernel.netns import NetworkNamespace
from kptrace.signals.lookup import LookupSignal, Options
from kptrace.signals.lookup_kernel import LookupKernel
from kptrace.signals.sampling import Sampling

CHAIN = "table ip t { chain c { type filter hook output priority -100; udp dport 5353 counter; }; }"
ROUNDS = 150
PACKETS = 20_000


class NoTimers:
    """Timers that never fire: a benchmark re-plans nothing."""

    def call_every(self, _seconds: float, _callback: Callable[[], None]) -> None:
        """Forget the callback."""

    def call_soon_threadsafe(self, _callback: Callable[[], None]) -> None:
        """Forget the callback."""


def packets(bytecode: Bytecode, loops: Path) -> list[Figure]:
    """Time per packet of a bracket, over the same flood on one CPU, the ways in short rounds and random order.

    Everything is attached anew for each round: where its memory happens to lie differs by tens of ns.
    """
    ways: dict[str, Callable[[ExitStack, Namespace], None]] = {
        "nothing": lambda _stack, _namespace: None,
        "empty": partial(_two_empty, bytecode),
        "all": partial(_bracket, bytecode, Sampling(1, 1)),
        "thin": partial(_bracket, bytecode, Sampling(1, 64)),
    }
    rows: dict[str, list[float]] = {name: [] for name in ways}
    cpu = str(max(os.sched_getaffinity(0)))
    with Namespace("bench") as namespace:
        namespace.run(["nft", "-f", "-"], stdin=CHAIN)
        for _ in range(ROUNDS):
            for name, attach in random.sample(list(ways.items()), len(ways)):
                with ExitStack() as stack:
                    attach(stack, namespace)
                    out = namespace.run(["taskset", "-c", cpu, str(loops), "sendto", str(PACKETS)])
                rows[name].append(float(out.split()[0]))
    # What else the machine does only ever adds time, so the quicker rounds are the truer ones.
    quick = {name: statistics.quantiles(values, n=4)[0] for name, values in rows.items()}
    return [
        Figure("one loopback UDP send, no daemon", quick["nothing"], "ns"),
        Figure("+ two empty netfilter programs", quick["empty"] - quick["nothing"], "ns"),
        Figure("bracket, every packet, above them", quick["all"] - quick["empty"], "ns", 130),
        Figure("bracket, 1/64, above them", quick["thin"] - quick["empty"], "ns", 20),
    ]


def _two_empty(bytecode: Bytecode, stack: ExitStack, namespace: Namespace) -> None:
    code = link(bytecode.functions["lookup_nothing"], map_fds={})
    program = load_program("nothing", code, ProgramType.NETFILTER, AttachType.NETFILTER)
    stack.callback(os.close, program)
    with namespace.enter():
        for priority in (-101, -99):
            stack.callback(os.close, attach_netfilter(program, 2, 3, priority))


def _bracket(bytecode: Bytecode, sampling: Sampling, stack: ExitStack, namespace: Namespace) -> None:
    netns = NetworkNamespace(namespace.path)
    stack.callback(netns.close)
    options = Options(sampling=sampling)
    signal = LookupSignal(LookupKernel(bytecode), netns, InstalledChains(netns), NoTimers(), options)
    stack.callback(signal.close)
    signal.start()
