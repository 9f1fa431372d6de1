# SPDX-License-Identifier: Apache-2.0
"""The signal of map writes on maps of the test's own, and a writer that is called like Cilium's agent."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from kptrace.daemon.loop import Loop
from kptrace.experiments.netns import Namespace
from kptrace.kernel.bytecode import Bytecode
from kptrace.kernel.maps import Map, MapSpec, MapType
from kptrace.kernel.objects import map_info
from kptrace.model.metrics import HistogramSample
from kptrace.model.rewrite import Rewrite
from kptrace.signals.map_write import HOLD_NS, MapWriteSignal, Options
from kptrace.signals.map_write_records import MapWrite, Replacement, WatchedMap
from kptrace.signals.process_watch import ProcessWatch
from tests.native.rewrite_bench import process_bytecode

PATIENCE_SECONDS = 30.0
AGENT = "cilium-agent"
_ROOT = Path(__file__).parents[2]
_WRITER = Path(__file__).with_name("map_writer.py")


class MapWriteBench:
    """One running signal; `writes`, `replacements` and `rewrites` have what it told of."""

    def __init__(self, bytecode: Bytecode, folder: Path) -> None:
        self.folder = folder
        self.loop = Loop()
        self.writes: list[MapWrite] = []
        self.replacements: list[Replacement] = []
        self.rewrites: list[Rewrite] = []
        self.settled_ns = 0
        self.maps: list[Map] = []
        self._watched: dict[int, WatchedMap] = {}
        self.processes = ProcessWatch(process_bytecode())
        self.processes.start()
        self.signal = MapWriteSignal(
            bytecode,
            self.loop,
            processes=self.processes.consume,
            options=Options(
                on_write=self.writes.append,
                on_replacement=self.replacements.append,
                on_rewrite=self.rewrites.append,
                settled=self._settled,
            ),
        )
        self.signal.start()
        self.agent = folder / AGENT
        shutil.copy(Path(sys.executable).resolve(), self.agent)

    def _settled(self, until_ns: int) -> None:
        assert until_ns >= self.settled_ns
        self.settled_ns = until_ns

    def make(
        self,
        name: str = "cilium_lb4_services_v2",
        size: int = 4096,
        kind: MapType = MapType.HASH,
        key_size: int = 12,
        value_size: int = 12,
    ) -> Map:
        """A map that nobody watches yet."""
        made = Map(MapSpec(name, kind, key_size, value_size, size))
        os.set_inheritable(made.fd, True)
        self.maps.append(made)
        return made

    def watch(self, map_: Map, number: int = 1, family: str = "ipv4", **different: int) -> int:
        """Watch a map too; its id."""
        info = map_info(map_.fd)
        sizes = {"type": info.type, "key_size": info.key_size, "value_size": info.value_size, **different}
        name = map_.spec.name.removeprefix("cilium_")
        self._watched[info.id] = WatchedMap(number, name, family, **sizes)
        self.signal.watch(self._watched)
        return info.id

    def forget(self, map_: Map) -> None:
        """Watch it no longer."""
        del self._watched[map_info(map_.fd).id]
        self.signal.watch(self._watched)

    def step(self, what: str, map_: Map, first: int, count: int) -> list[object]:
        """A step of the writer."""
        return [what, map_.fd, first, count, map_.spec.key_size, map_.spec.value_size]

    def start(
        self,
        steps: Sequence[Sequence[object]],
        strace: Path | None = None,
        namespace: Namespace | None = None,
    ) -> "subprocess.Popen[str]":
        """Start a writer; its process id is that of the writer itself, unless it is traced."""
        trace = ["strace", "-f", "-ttt", "-T", "-e", "trace=bpf", "-o", str(strace)] if strace else []
        command = [*trace, str(self.agent), str(_WRITER), json.dumps(steps)]
        paths = [str(_ROOT), *(path for path in sys.path if "site-packages" in path)]
        arguments = {
            "env": {**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            "stdin": subprocess.PIPE,
            "stdout": subprocess.PIPE,
            "text": True,
            "close_fds": False,
        }
        if namespace is None:
            return subprocess.Popen(command, **arguments)  # type: ignore[call-overload,no-any-return]
        with namespace.enter():
            return subprocess.Popen(command, **arguments)  # type: ignore[call-overload,no-any-return]

    def finish(self, process: "subprocess.Popen[str]") -> list[object]:
        """Let it end, run the loop meanwhile, and take in all that it did; what its steps returned."""
        assert process.stdin
        assert process.stdout
        process.stdin.close()
        self.until(lambda: process.poll() is not None)
        with process.stdout as output:
            text = output.read()
        assert process.returncode == 0, text
        self.settle()
        return list(json.loads(text))

    def write(self, *steps: Sequence[object], strace: Path | None = None) -> list[object]:
        """Run a writer to its end."""
        return self.finish(self.start(steps, strace))

    def until(self, condition: Callable[[], bool]) -> None:
        """Run the loop until something is so."""
        end = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            assert time.monotonic() < end, "it never came"
            self.loop.run_once(0.02)

    def settle(self) -> None:
        """Take in everything that happened so far, bursts included."""
        now = time.monotonic_ns() + HOLD_NS
        self.until(lambda: self.settled_ns > now)

    def rows(self, name: str) -> dict[tuple[str, ...], float]:
        """A family's values, or counts, by labels."""
        found: dict[tuple[str, ...], float] = {}
        for family in self.signal.families():
            for sample in family.samples if family.spec.name == name else ():
                found[sample.labels] = float(
                    sample.count if isinstance(sample, HistogramSample) else sample.value
                )
        return found

    def objects(self, operation: str) -> int:
        """Entries that rewrites told of."""
        return sum(
            each.count for rewrite in self.rewrites for each in rewrite.objects if each.operation == operation
        )

    def close(self) -> None:
        """Detach everything."""
        self.signal.close()
        self.processes.close()
        self.loop.close()
        for each in self.maps:
            each.close()
