# SPDX-License-Identifier: Apache-2.0
"""Starts the agent (`cilium_agent`) as a process that looks like Cilium's, and tells it what to do."""

import json
import os
import random
import shutil
import site
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, Self

from kptrace.experiments import cilium_agent
from kptrace.experiments.cilium_agent import to_json
from kptrace.experiments.cilium_cgroup import Cgroup
from kptrace.experiments.cilium_datapath import compile_datapath
from kptrace.experiments.cilium_layouts import SERVICES, Version
from kptrace.experiments.cilium_maps import BpfFilesystem
from kptrace.experiments.cilium_writer import MapsWritten
from kptrace.experiments.interrupts import unhurried
from kptrace.experiments.netns import Namespace, stop
from kptrace.experiments.services import ServiceSpec, change_endpoint
from kptrace.kernel.compile import Compiler
from kptrace.kernel.host import Host
from kptrace.model.errors import KptraceError

#: What the process is called, by its executable, as the table of writers has it.
EXECUTABLE = "cilium-agent"
# It closes links and maps, which takes milliseconds.
_END_SECONDS = 10.0
# A copied interpreter does not know the virtual environment, whose folder may lead to packages elsewhere (.pth files).
_START = f"""\
import os, runpy, site, sys
for folder in sys.argv.pop(1).split(os.pathsep):
    site.addsitedir(folder)
runpy.run_module({cilium_agent.__name__!r}, run_name="__main__", alter_sys=True)
"""


@dataclass(frozen=True, slots=True)
class AgentRequest:
    """What kind of agent.

    Attributes:
        version: whose maps it makes.
        attach: `auto`, `tcx`, `clsact`, or `none` for an agent that has maps only.
        xdp: attach `cil_xdp_entry` too.
        sockets: translate connect() of what joins the agent's `cgroup`.
        batch: write Services by batches.
        entries: for so many there is room in each map of Services and back ends.
        cache: where compiled programs are kept between agents; a folder of its own if None.
    """

    version: Version = Version.CURRENT
    attach: str = "auto"
    xdp: bool = False
    sockets: bool = True
    batch: bool = False
    entries: int = SERVICES
    cache: Path | None = None


@dataclass(frozen=True, slots=True)
class Done:
    """What the agent did at a command.

    Attributes:
        written: into maps.
        began_ns, ended_ns: when, in CLOCK_MONOTONIC.
    """

    written: MapsWritten
    began_ns: int
    ended_ns: int


class AgentProcess:
    """A running agent with a BPF file system and a cgroup of its own; a context manager that leaves nothing behind.

    The kernel calls a process by the path that was executed, and a link leads to its target's name: so the interpreter is
    copied to a file of the agent's name, and told by its environment where its library is.

    Attributes:
        root: of the BPF file system.
        cgroup: whose connections are translated (None without `sockets`).
        programs: ids of the attached programs and of those that they tail-call, by name.
        services: what is installed.
    """

    def __init__(self, namespace: Namespace, request: AgentRequest | None = None) -> None:
        """Prepare an agent for a node's namespace (of `EmbeddedNode`, unless it attaches nothing)."""
        self._namespace = namespace
        self._request = request or AgentRequest()
        self._stack = ExitStack()
        self._process: subprocess.Popen[str] | None = None
        self.root = Path()
        self.cgroup: Cgroup | None = None
        self.programs: dict[str, int] = {}
        self.services: list[ServiceSpec] = []

    def __enter__(self) -> Self:
        try:
            self.root = self._stack.enter_context(BpfFilesystem()).root
            if self._request.sockets:
                self.cgroup = self._stack.enter_context(Cgroup())
            folder = Path(self._stack.enter_context(TemporaryDirectory(prefix="kptrace-agent-")))
            self._process = self._namespace.popen(self._command(folder), stdin=True)
            self._stack.callback(self.stop)
            self.programs = self._answer()["ready"]
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """The process id."""
        return self._running().pid

    def install(self, services: Sequence[ServiceSpec]) -> Done:
        """Write all of them, and remove what was there but is not among them."""
        done = self._do("install", [to_json(each) for each in services])
        self.services = list(services)
        return done

    def replace(self, index: int, after: ServiceSpec) -> Done:
        """Give one installed Service other endpoints."""
        done = self._do("replace", index, to_json(after))
        self.services[index] = after
        return done

    def changing(self, changes: int, *, seed: int = 0) -> Iterator[Done]:
        """Change one endpoint of a random Service before each of `changes` steps of the caller's."""
        if not self.services:
            raise KptraceError("no Services are installed", remedy="install some before they are changed")
        chooser = random.Random(seed)
        for step in range(changes):
            index = chooser.randrange(len(self.services))
            yield self.replace(index, change_endpoint(self.services[index], step))

    def churn(self, changes: int, *, seed: int = 0) -> Done:
        """As `changing`, but one after the other and by the agent alone: `services` stays what was asked for."""
        return self._do("churn", changes, seed)

    def remove(self) -> Done:
        """Take all Services away."""
        done = self._do("remove")
        self.services = []
        return done

    def regenerate(self) -> Done:
        """Replace all programs by new ones."""
        return self._do("regenerate")

    def stop(self) -> None:
        """End the agent: its maps, programs and pins go. Idempotent."""
        if self._process is not None:
            process, self._process = self._process, None
            with unhurried():
                if process.stdin is not None:
                    # It may be dead, or not end by itself: `stop` ends it all the same.
                    with suppress(BrokenPipeError, subprocess.TimeoutExpired):
                        process.stdin.close()
                        process.wait(_END_SECONDS)
                stop(process)

    def close(self) -> None:
        """End the agent and remove what it may have left. Idempotent."""
        self._stack.close()

    def _command(self, folder: Path) -> list[str]:
        executable = folder / EXECUTABLE
        shutil.copy2(Path(sys.executable).resolve(), executable)
        request = self._request
        cache = request.cache or folder / "cache"
        if request.attach != "none":
            # Here, so that the agent's own system calls are those of an agent.
            compile_datapath(Compiler(Host().vmlinux_btf, cache))
        environment = {"PYTHONHOME": sys.base_prefix, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        return [
            "env",
            *(f"{name}={value}" for name, value in environment.items()),
            *(str(executable), "-c", _START, os.pathsep.join(site.getsitepackages())),
            *("--bpffs", str(self.root)),
            *("--version", request.version, "--entries", str(request.entries)),
            *("--cache", str(cache)),
            *("--attach", request.attach),
            *(("--xdp",) if request.xdp else ()),
            *(("--batch",) if request.batch else ()),
            *(("--cgroup", str(self.cgroup.path)) if self.cgroup is not None else ()),
        ]

    def _running(self) -> "subprocess.Popen[str]":
        if self._process is None:
            raise KptraceError("the agent does not run")
        return self._process

    def _do(self, *words: object) -> Done:
        process = self._running()
        if process.stdin is None:
            raise KptraceError("the agent was started without pipes")
        with suppress(BrokenPipeError):  # it ended: there will be no answer, and what it said last is told
            process.stdin.write(json.dumps(words) + "\n")
            process.stdin.flush()
        answer = self._answer()
        self.programs = answer["programs"]
        return Done(MapsWritten(**answer["written"]), answer["began_ns"], answer["ended_ns"])

    def _answer(self) -> dict[str, Any]:
        process = self._running()
        if process.stdout is None or process.stderr is None:
            raise KptraceError("the agent was started without pipes")
        line = process.stdout.readline()
        if not line:
            raise KptraceError(f"the agent ended: {process.stderr.read().strip()[-400:]}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise KptraceError(f"the agent: {answer['error']}")
        return answer
