# SPDX-License-Identifier: Apache-2.0
"""The datapath's runs with their clockwork in the test's hands, on programs that the test loads, runs and replaces."""

import errno
import os
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from kptrace.dataplanes.cilium.detect import Detector
from kptrace.experiments.cilium_cgroup import cgroup_root
from kptrace.experiments.netns import Namespace
from kptrace.kernel.attach_datapath import attach_tcx
from kptrace.kernel.compile import Compiler
from kptrace.kernel.host import Host
from kptrace.kernel.load import AttachType, ProgramType
from kptrace.kernel.memlock import raise_memlock
from kptrace.kernel.objects import open_program, program_info
from kptrace.model.errors import KernelError, UnsupportedError
from kptrace.model.metrics import HistogramSample
from kptrace.signals.datapath_lookup import DatapathLookup, Options
from kptrace.signals.datapath_tracer import REQUEST
from kptrace.signals.sampling import Sampling
from tests.native import traffic
from tests.native.lookup_bench import ManualTimers
from tests.native.objects_bench import load

PORT = 5354
Lacking = Callable[[str], NoReturn]
_ATTACH_TYPES = {
    "cil_xdp_entry": AttachType.XDP,
    "cil_sock4_connect": AttachType.CGROUP_INET4_CONNECT,
    "cil_sock6_connect": AttachType.CGROUP_INET6_CONNECT,
}


class DatapathBench:
    """One running signal and its counts by label; it measures only programs that the test told it of."""

    def __init__(self, **options: Any) -> None:
        raise_memlock()
        self.mine: set[int] = set()
        self.timers = ManualTimers()
        self._detector = Detector()
        code = Compiler(Path("/sys/kernel/btf/vmlinux"), Path("/var/cache/kptrace")).build(REQUEST)
        chosen = Options(**{"sampling": Sampling(1, 1), **options})
        self.signal = DatapathLookup(code, self.timers, Host(), chosen)
        self.signal.start()

    def look(self) -> None:
        """Tell the signal what is there of the test's."""
        seen = self._detector.look()
        own = tuple(found for found in seen.programs if found.info.id in self.mine)
        self.signal.see(replace(seen, programs=own))

    def add(self, program: int) -> int:
        """Measure this program (a descriptor) from the next look on; its id."""
        number = program_info(program).id
        self.mine.add(number)
        return number

    def rows(self, name: str = "kptrace_lookup_duration_seconds") -> list[dict[str, Any]]:
        """Every histogram of that name as its labels, `count` and `sum`."""
        rows = []
        for family in self.signal.families():
            if family.spec.name == name:
                for sample in family.samples:
                    assert isinstance(sample, HistogramSample)
                    row: dict[str, Any] = dict(zip(family.spec.labels, sample.labels, strict=True))
                    rows.append({**row, "count": sample.count, "sum": sample.sum})
        return rows

    def count(self, **labels: str) -> int:
        """Runs whose labels have these values."""
        return sum(row["count"] for row in self._chosen(labels))

    def seconds(self, **labels: str) -> float:
        """What those runs took in all."""
        return float(sum(row["sum"] for row in self._chosen(labels)))

    def _chosen(self, labels: dict[str, str]) -> list[dict[str, Any]]:
        return [row for row in self.rows() if all(row[name] == value for name, value in labels.items())]

    def values(self, name: str) -> dict[tuple[str, ...], float]:
        """Samples of a counter or gauge by their labels."""
        values = {}
        for family in self.signal.families():
            if family.spec.name == name:
                for sample in family.samples:
                    assert not isinstance(sample, HistogramSample)
                    values[sample.labels] = sample.value
        return values

    def lost(self) -> int:
        """All losses."""
        for call in self.timers.calls:
            call()
        return int(sum(self.values("kptrace_lookup_unpaired_total").values()))


def working(code: int, rounds: int) -> bytes:
    """Instructions of a program that goes round a loop before it returns a code."""

    def instruction(op: int, registers: int, offset: int, immediate: int) -> bytes:
        return struct.pack("<BBhi", op, registers, offset, immediate)

    return (
        instruction(0xB7, 1, 0, rounds)  # r1 = rounds
        + instruction(0x17, 1, 0, 1)  # r1 -= 1
        + instruction(0x55, 1, -2, 0)  # if r1 != 0 goto -2
        + instruction(0xB7, 0, 0, code)  # r0 = code
        + instruction(0x95, 0, 0, 0)
    )


def program(name: str, kind: ProgramType, code: bytes) -> int:
    """A program under a name of Cilium's; its descriptor."""
    return load(name, kind, _ATTACH_TYPES.get(name, AttachType.NONE), code)


@contextmanager
def cgroups() -> Iterator[Path]:
    """Where a cgroup2 is mounted: a test machine's first program mounts none."""
    try:
        yield cgroup_root()
        return
    except UnsupportedError:
        where = Path("/sys/fs/cgroup")
    subprocess.run(["mount", "-t", "cgroup2", "none", where], check=True)
    try:
        yield where
    finally:
        subprocess.run(["umount", where], check=True)


def alive(number: int) -> bool:
    """Whether the kernel still has a program."""
    fd = open_program(number)
    if fd is not None:
        os.close(fd)
    return fd is not None


def at_loopback(namespace: Namespace, target: int, lacking: Lacking) -> int:
    """Link a program to what comes in at the loopback."""
    try:
        return namespace.call(lambda: attach_tcx(target, socket.if_nametoindex("lo"), ingress=True))
    except KernelError as error:
        if error.errno != errno.EINVAL:
            raise
        os.close(target)
        lacking(f"tcx links: {error}")


def send(family: int, packets: int) -> None:
    """Datagrams over the loopback."""
    with traffic.udp_sink(family, PORT):
        traffic.udp_one_flow(family, PORT, packets)


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait until it holds."""
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.01)
