# SPDX-License-Identifier: Apache-2.0
"""The bpf(2) calls of a process as strace saw them: the oracle of what Cilium's agent wrote, and when."""

import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from kptrace.experiments.netns import stop

_LINE = re.compile(r"^(?:\d+ +)?(\d+)\.(\d{9}) (.*)$")
_CALL = re.compile(r"^bpf\((BPF_\w+), \{map_fd=(\d+)\b.*\) = (-?\d+)")


@dataclass(frozen=True, slots=True)
class BpfCall:
    """One call on a map: its entry and the entry of the process's next call, ns since 1970, and the map's descriptor."""

    begin_ns: int
    end_ns: int
    command: str
    descriptor: int
    result: int


@contextmanager
def traced(pid: int, log: Path) -> Iterator[None]:
    """The process is traced inside: its calls of bpf(2), and when it answers."""
    argv = [
        *("strace", "-f", "--absolute-timestamps=format:unix,precision:ns"),
        *(
            "--quiet=all",
            "-s",
            "0",
            "-e",
            "trace=bpf,write",
            "-e",
            "signal=none",
            "-o",
            str(log),
            "-p",
            str(pid),
        ),
    ]
    process = subprocess.Popen(argv, text=True)
    try:
        ends = time.monotonic() + 10.0
        while f"TracerPid:\t{process.pid}" not in Path(f"/proc/{pid}/status").read_text():
            assert time.monotonic() < ends, "strace does not attach"
            time.sleep(0.02)
        yield
    finally:
        stop(process)


def bpf_calls(log: Path) -> list[BpfCall]:
    """All calls on maps so far, in their order. The process has one thread, and writes an answer after the last."""
    lines = [match for line in log.read_text(encoding="utf-8").splitlines() if (match := _LINE.match(line))]
    found = []
    for line, after in pairwise(lines):
        match = _CALL.match(line[3])
        if match is not None:
            begin, end = (int(each[1]) * 10**9 + int(each[2]) for each in (line, after))
            found.append(BpfCall(begin, end, match[1], int(match[2]), int(match[3])))
    return found


def map_id(pid: int, descriptor: int) -> int:
    """The kernel's id of the map behind a descriptor."""
    text = Path(f"/proc/{pid}/fdinfo/{descriptor}").read_text()
    return int(next(line.split()[1] for line in text.splitlines() if line.startswith("map_id:")))
