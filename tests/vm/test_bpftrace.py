# SPDX-License-Identifier: Apache-2.0
"""Look-ups by function against bpftrace's entry and exit pair on the same function: same count, same times."""

import json
import math
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import pytest

from kptrace.experiments.netns import Namespace
from kptrace.model.metrics import HistogramSample
from tests.native import traffic
from tests.native.lookup_bench import nft
from tests.vm.function_bench import FunctionBench, modprobe
from tests.vm.test_lookup_function import MECHANISMS, PORT

# bpftrace works where kprobes do.
pytestmark = pytest.mark.promised("lookup", "kprobe")
PACKETS = 997
#: Pairs of turns, of which one must agree.
PAIRS = 3
#: Long enough that a tracer's own work is small beside the walk.
RULES = 1000
CHAIN = "".join(
    (
        "table ip t {\n chain c {\n  type filter hook output priority 0;\n",
        *(f"  ip daddr 192.0.{n >> 8}.{n & 255} drop\n" for n in range(RULES)),
        " }\n}\n",
    )
)
SCRIPT = (
    "kprobe:nft_do_chain { @start[tid] = nsecs; } "
    "kretprobe:nft_do_chain /@start[tid]/ { @ns = hist(nsecs - @start[tid]); delete(@start[tid]); } "
    'BEGIN { printf("ready\\n"); } END { clear(@start); }'
)
_SECONDS = 120.0


@dataclass
class Counted:
    """What bpftrace's histogram has: (lower edge in ns, packets)."""

    buckets: list[tuple[int, int]] = field(default_factory=list)

    @property
    def count(self) -> int:
        """Packets."""
        return sum(packets for _, packets in self.buckets)

    @property
    def power(self) -> int:
        """The power of two, in ns, that the middle packet took."""
        left = self.count / 2
        for edge, packets in self.buckets:
            left -= packets
            if left <= 0:
                return int(math.log2(max(1, edge)))
        raise AssertionError("nothing was counted")


@contextmanager
def bpftrace() -> Iterator[Counted]:
    """The pair attached; what it counted is known after the block."""
    counted = Counted()
    argv = ["bpftrace", "-B", "line", "-f", "json", "-e", SCRIPT]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    said = []
    try:
        for line in process.stdout:
            said.append(line)
            if "ready" in line:
                break
        else:
            raise AssertionError(f"bpftrace does not start: {said}")
        yield counted
    finally:
        process.terminate()
        rest, _ = process.communicate(timeout=_SECONDS)
    for document in _documents(rest):
        if document.get("type") == "hist":
            buckets = document["data"]["@ns"]
            counted.buckets = [(int(each.get("min", 0)), int(each["count"])) for each in buckets]
    print("bpftrace:", counted.buckets)


def _documents(text: str) -> Iterator[dict[str, Any]]:
    for line in text.splitlines():
        if line.startswith("{"):
            yield json.loads(line)


@pytest.fixture
def walked(namespace: Namespace, lacking: Callable[[str], NoReturn]) -> Namespace:
    """A namespace whose packets walk a long chain of nft's."""
    loaded = modprobe("nf_tables")
    assert loaded.returncode == 0, loaded.stderr
    btf = Path("/sys/kernel/btf/nf_tables")
    if not btf.exists():
        lacking(f"{btf} is not there")
    lockdown = Path("/sys/kernel/security/lockdown").read_text().strip()
    if "[confidentiality]" in lockdown:
        lacking(f"what bpftrace needs: lockdown is {lockdown}")
    nft(namespace, CHAIN)
    return namespace


def send(namespace: Namespace) -> None:
    """Datagrams of one flow over the loopback, none of which is answered."""

    def run() -> None:
        with traffic.udp_sink(socket.AF_INET, PORT):
            traffic.udp_one_flow(socket.AF_INET, PORT, PACKETS)

    namespace.call(run)


def middle(bench: FunctionBench) -> tuple[float, float]:
    """The bucket, in ns, that kptrace has the middle packet in."""
    (found,) = [
        sample
        for family in bench.signal.families()
        for sample in family.samples
        if isinstance(sample, HistogramSample) and "t" in sample.labels
    ]
    low = 0.0
    for edge, count in found.buckets:
        if count >= found.count / 2:
            return low * 1e9, edge * 1e9
        low = edge
    raise AssertionError("nothing was counted")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_beside_bpftrace_both_count_the_same(mechanism: str, walked: Namespace) -> None:
    """Of 997 packets through one chain both have 997, while both are attached."""
    bench = FunctionBench(mechanism, walked)  # type: ignore[arg-type]
    try:
        with bpftrace() as theirs:
            send(walked)
        assert bench.count(table="t", chain="c") == PACKETS == theirs.count
    finally:
        bench.close()


@pytest.mark.timeout(900)
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_by_turns_with_bpftrace_the_times_agree(mechanism: str, walked: Namespace) -> None:
    """The middle packet's power of two differs by one at most when they measure one after the other.

    A machine whose speed changes between the two turns makes a difference that neither of them has: it is not there in
    every pair of turns, a tracer's own one is.
    """
    pairs = []
    for _ in range(PAIRS):
        with bpftrace() as theirs:
            send(walked)
        bench = FunctionBench(mechanism, walked)  # type: ignore[arg-type]
        try:
            send(walked)
            assert bench.count(table="t", chain="c") == theirs.count == PACKETS
            (low, high), power = middle(bench), theirs.power
        finally:
            bench.close()
        pairs.append(
            f"the middle packet: {low:.0f} to {high:.0f} ns, bpftrace {2**power} to {2 ** (power + 1)} ns"
        )
        print(pairs[-1])
        if low < 2 ** (power + 2) and high > 2 ** (power - 1):
            return
    raise AssertionError(pairs)
