# SPDX-License-Identifier: Apache-2.0
"""The allocator's knobs, in a process of the test's own: they last as long as it does. What they save, `make bench` says."""

import subprocess
import sys

import pytest

CODE = """
import threading
from kptrace.kernel.allocator import give_memory_back
assert not {told} or give_memory_back()
stay = threading.Barrier(5)
def fill():
    blocks = [bytearray(60_000) for _ in range(10)]
    stay.wait()
    stay.wait()
threads = [threading.Thread(target=fill) for _ in range(4)]
for thread in threads:
    thread.start()
stay.wait()
print(open("/proc/self/maps").read())
stay.wait()
"""
#: A thread's arena is a heap that begins at a multiple of so much, and has so much of addresses.
_HEAP = 1 << 26


def arenas(*, told: bool) -> int:
    """How many arenas beside the main one a process has whose four threads allocate."""
    code = CODE.replace("{told}", str(told))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    starts = {}
    for line in filter(None, done.stdout.splitlines()):
        where, rights, *_, inode = line.split()[:5]
        begin, end = (int(each, 16) for each in where.split("-"))
        if inode == "0":
            starts[begin] = (end, rights)
    return sum(
        begin % _HEAP == 0 and rights.startswith("rw") and starts.get(end, (0, ""))[0] == begin + _HEAP
        for begin, (end, rights) in starts.items()
    )


@pytest.mark.parametrize("told", [False, True])
def test_threads_share_one_arena_if_told(*, told: bool) -> None:
    """Without being told each of them has its own."""
    assert (arenas(told=told) == 0) is told
