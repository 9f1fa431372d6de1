# SPDX-License-Identifier: Apache-2.0
"""The overhead budget under a real flood: thinner, then detached, and back again when it is calm."""

import socket
from collections.abc import Callable

from kptrace.experiments.netns import Namespace
from kptrace.model.signal import State
from kptrace.signals.sampling import Sampling
from tests.native import traffic
from tests.native.lookup_bench import LookupBench, nft, nft_counter

PORT = 5353
BURST = 2003


def value(bench: LookupBench, name: str, *labels: str) -> float:
    """One sample of a family."""
    family = next(family for family in bench.signal.families() if family.spec.name == name)
    return next(sample.value for sample in family.samples if sample.labels == labels)


def test_a_flood_detaches_and_calm_attaches(
    measure: Callable[..., LookupBench], namespace: Namespace
) -> None:
    """Above the budget the divisor doubles until the brackets detach; in calm they come back and it falls again."""
    chain = (
        f"table ip t {{ chain c {{ type filter hook output priority -100; udp dport {PORT} counter; }}; }}"
    )
    nft(namespace, chain)
    bench = measure(sampling=Sampling(1, 8192), budget=1e-6)
    tick, govern, _ = bench.timers.calls
    assert value(bench, "kptrace_sampling_ratio", "lookup", "rest") == 1 / 8192

    def burst() -> None:
        with traffic.udp_sink(socket.AF_INET, PORT):
            traffic.udp_one_flow(socket.AF_INET, PORT, 50 * BURST)

    ratios = []
    for _ in range(12):
        namespace.call(burst)
        govern()
        ratios.append(value(bench, "kptrace_sampling_ratio", "lookup", "rest"))
        if not bench.signal.boundaries:
            break
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[-1] == 0
    state = bench.signal.states()[0]
    assert (state.state, state.reason) == (State.OFF, "over_budget")
    before = nft_counter(namespace, "c")
    namespace.call(burst)
    assert nft_counter(namespace, "c") == before + 50 * BURST

    for _ in range(40):
        govern()
        tick()
    assert bench.signal.states()[0].state is State.ACTIVE
    assert value(bench, "kptrace_sampling_ratio", "lookup", "rest") == 1 / 8192
    assert bench.signal.boundaries
