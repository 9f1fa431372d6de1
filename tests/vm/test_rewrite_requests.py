# SPDX-License-Identifier: Apache-2.0
"""What a process asks nfnetlink for by itself, on each kernel: noted, and timed once it is followed."""

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kptrace.experiments.netns import Namespace
from kptrace.kernel.compile import Compiler
from kptrace.kernel.memlock import raise_memlock
from kptrace.signals.rewrite_kernel import REQUEST, RewriteKernel
from kptrace.signals.rewrite_requests_records import Requests, Subsystem, decode, is_requests
from tests.native import batches

#: Where the daemon in the VM keeps what it compiled.
CACHE = Path("/var/cache/kptrace")
GETCHAIN, CT_GET, DUMP = 10 << 8 | 4, 1 << 8 | 1, 0x300
NLMSG_ERROR, NLMSG_DONE = 2, 3
#: Prime, and too many for one receive.
CHAINS = 1009
#: Between two spans; the kernel joins what is closer than 5 ms.
REST_SECONDS = 0.1


class Bench:
    """The rewrite programs, and this process as the one that asks."""

    def __init__(self) -> None:
        """Attach what is always attached."""
        raise_memlock()
        self.inbox: list[bytes] = []
        self.kernel = RewriteKernel(
            Compiler(Path("/sys/kernel/btf/vmlinux"), CACHE).build(REQUEST), self.inbox.append
        )
        self.kernel.attach()

    def mine(self, found: Iterator[Requests]) -> list[Requests]:
        """Those of this process."""
        return [each for each in found if each.asker.tgid == os.getpid()]

    def ended(self) -> list[Requests]:
        """Spans of this process that another one followed."""
        self.kernel.consume()
        found = [decode(each) for each in self.inbox if is_requests(each)]
        return [each for each in found if each is not None and each.asker.tgid == os.getpid()]


def dump(channel: socket.socket, kind: int) -> tuple[int, int, int]:
    """Dump over IPv4; how many receives, and the moments before and after all that."""
    before = time.monotonic_ns()
    channel.send(batches.message(kind, 1 | DUMP, batches.IPV4, 0))
    receives, done = 0, False
    while not done:
        data = channel.recv(65536)
        receives += 1
        done = bool({NLMSG_ERROR, NLMSG_DONE} & set(kinds(data)))
    return receives, before, time.monotonic_ns()


def kinds(data: bytes) -> Iterator[int]:
    """Of the messages in a datagram."""
    at = 0
    while at < len(data):
        yield int.from_bytes(data[at + 4 : at + 6], "little")
        at += (int.from_bytes(data[at : at + 4], "little") + 3) & ~3


@pytest.fixture
def bench() -> Iterator[Bench]:
    """Attached."""
    made = Bench()
    yield made
    made.kernel.close()


@pytest.mark.promised("rewrite", "tracepoint")
def test_requests_are_noted_and_then_timed(bench: Bench) -> None:
    """First only that they came; followed, each span lies within the process's own clock and reaches its last answer."""
    with Namespace("test") as namespace:
        namespace.run(["nft", "add", "table", "ip", "t"])
        namespace.run(["nft", "-f", "-"], stdin="".join(f"add chain ip t c{n}\n" for n in range(CHAINS)))

        def body() -> None:
            with batches.open_socket() as channel:
                _, before, after = dump(channel, GETCHAIN)
                (first,) = bench.mine(bench.kernel.take_askers())
                assert (first.asker.subsystem, first.asker.family) == (Subsystem.NFTABLES, "ipv4")
                assert before < first.begin_ns == first.end_ns < after
                assert bench.mine(bench.kernel.take_askers()) == []
                assert bench.kernel.follow(os.getpid())
                bench.kernel.attach_receives()
                receives, before, after = dump(channel, GETCHAIN)
                assert receives > 1
                (list_,) = bench.mine(bench.kernel.spans())
                assert list_.asker == first.asker
                assert before < list_.begin_ns < list_.end_ns < after
                channel.send(batches.batch(batches.new_table("t2", flags=0x400 | batches.NLM_F_ACK)))
                assert batches.answers(channel) == [0]
                assert bench.mine(bench.kernel.spans()) == [list_]
                time.sleep(REST_SECONDS)
                dump(channel, GETCHAIN)
                assert bench.ended() == [list_]
            with batches.open_socket() as channel:
                _, before, after = dump(channel, CT_GET)
                found = {each.asker.subsystem: each for each in bench.mine(bench.kernel.spans())}
                assert (
                    before < found[Subsystem.CTNETLINK].begin_ns < found[Subsystem.CTNETLINK].end_ns < after
                )

        namespace.call(body)
    bench.kernel.unfollow(os.getpid())
    assert bench.mine(bench.kernel.spans()) == []
    assert not any(bench.kernel.losses().values())
