# SPDX-License-Identifier: Apache-2.0
"""The phases of rewrites on each kernel, against strace's durations of the same system calls and plain counts."""

import re
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NoReturn

import pytest

from kptrace.experiments.netns import Namespace
from kptrace.kernel.bytecode import Bytecode
from kptrace.kernel.compile import Compiler
from kptrace.kernel.functions import MECHANISMS, Mechanism
from kptrace.kernel.memlock import raise_memlock
from kptrace.kernel.netns import NetworkNamespace
from kptrace.model.metrics import HistogramSample
from kptrace.signals.rewrite_phases import RewritePhases
from kptrace.signals.rewrite_phases_kernel import REQUESTS
from tests.vm.adding_up import fills

#: Where the daemon in the VM keeps what it compiled.
CACHE = Path("/var/cache/kptrace")
RULES = 10_000
#: Prime, so that no other factor of it hides a double count.
RUNS = 23
TABLE = "add table ip t\nadd chain ip t c\n"
#: The same without what it held.
EMPTY = TABLE + "flush chain ip t c\n"
LEGACY = "*filter\n-A OUTPUT -j ACCEPT\nCOMMIT\n"
PATIENCE_SECONDS = 60.0

Phase = tuple[str, str]


def rules(count: int = RULES) -> str:
    """That many rules of nft's."""
    return "".join(
        f"add rule ip t c ip daddr 10.0.{n // 256}.{n % 256} tcp dport 80 counter\n" for n in range(count)
    )


def big_table(count: int) -> str:
    """A legacy table with that many rules."""
    many = "".join(f"-A OUTPUT -d 10.0.{n // 256}.{n % 256} -j ACCEPT\n" for n in range(count))
    return LEGACY.replace("-A OUTPUT -j ACCEPT\n", many)


class Bench:
    """The phases of one namespace; what is asked for is what came since `mark`."""

    def __init__(self, bytecode: Bytecode, mechanism: Mechanism, namespace: Namespace) -> None:
        self.namespace = namespace
        self.netns = NetworkNamespace(namespace.path)
        self.phases = RewritePhases(bytecode, mechanism, self.netns)
        self._before: dict[Phase, tuple[int, float]] = {}

    def run(self, command: str, text: str = "", *, fails: bool = False) -> str:
        """Run a shell line inside, and return what it printed."""
        argv = ["bash", "-c", command]
        done = self.namespace.call(
            lambda: subprocess.run(argv, input=text, text=True, capture_output=True, check=False)
        )
        assert bool(done.returncode) is fails, (command, done)
        return done.stdout

    def seconds_of(self, call: str, command: str, text: str, *, fails: bool = False) -> float:
        """Run a tool under strace; the duration of its longest call of this kind."""
        traced = f"strace -f -T -e trace={call} -o /run/trace {command}; code=$?; cat /run/trace; exit $code"
        found = re.findall(rf"{call}\(.* <(\d+\.\d+)>$", self.run(traced, text, fails=fails), re.MULTILINE)
        assert found
        return max(map(float, found))

    def mark(self) -> None:
        """Begin anew."""
        self.phases.tick()
        self._before = self._totals()

    def _totals(self) -> dict[Phase, tuple[int, float]]:
        return {
            (sample.labels[0], sample.labels[1]): (sample.count, sample.sum)
            for family in self.phases.families()
            for sample in family.samples
            if isinstance(sample, HistogramSample)
        }

    def samples(self) -> dict[Phase, tuple[int, float]]:
        """Count and seconds of every phase that there was."""
        self.phases.tick()
        now = {
            phase: (
                count - self._before.get(phase, (0, 0.0))[0],
                total - self._before.get(phase, (0, 0.0))[1],
            )
            for phase, (count, total) in self._totals().items()
        }
        return {phase: value for phase, value in now.items() if value[0]}

    def counts(self) -> dict[Phase, int]:
        """How many of each; a destroy comes some time after its commit, a tear-down not on every kernel."""
        late = ("destroy",) if self.has_teardown else ("destroy", "teardown")
        return {phase: count for phase, (count, _) in self.samples().items() if phase[1] not in late}

    def seconds(self, plane: str, *phases: str) -> float:
        """Sum of the durations of these phases."""
        return sum(
            total for phase, (_, total) in self.samples().items() if phase in {(plane, p) for p in phases}
        )

    def usual(self, *phases: str) -> tuple[str, ...]:
        """These phases and those that always follow."""
        return (*phases, "teardown") if self.has_teardown else phases

    @property
    def has_teardown(self) -> bool:
        """Whether this kernel has nft_rcv_nl_event(): 5.10 has not."""
        return "nft_rcv_nl_event" not in self.phases.states()[0].detail.partition("not in this kernel")[2]

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait for something to be so."""
        end = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            assert time.monotonic() < end, "it never came"
            time.sleep(0.05)

    def nothing_lost(self) -> bool:
        """Whether everything was recorded."""
        return not any(self.phases.losses().values())

    def close(self) -> None:
        """Detach everything."""
        self.phases.close()
        self.netns.close()


@pytest.fixture(scope="session")
def compiled() -> dict[Mechanism, Bytecode]:
    """The programs of both mechanisms."""
    built = Compiler(Path("/sys/kernel/btf/vmlinux"), CACHE).build_each(list(REQUESTS.values()))
    assert all(isinstance(each, Bytecode) for each in built), built
    return {name: each for name, each in zip(REQUESTS, built, strict=True) if isinstance(each, Bytecode)}


@pytest.fixture(
    scope="session",
    params=[
        pytest.param(name, marks=pytest.mark.promised("rewrite_phases", name), id=name) for name in MECHANISMS
    ],
)
def started(request: pytest.FixtureRequest, compiled: dict[Mechanism, Bytecode]) -> Iterator[Bench]:
    """The phases by each mechanism that this kernel is promised to have."""
    raise_memlock()
    with Namespace("phases") as namespace:
        made = Bench(compiled[request.param], request.param, namespace)
        # Loads the modules that the tools would load with their first call.
        made.run("modprobe -a nft_compat; nft list tables; iptables-legacy -S; ip6tables-legacy -S; true")
        try:
            made.phases.start()
            yield made
        finally:
            made.close()


@pytest.fixture
def bench(started: Bench) -> Bench:
    """The phases with nothing counted yet, in a namespace without rules."""
    deleted = "table" in started.run("nft list tables")
    started.mark()
    started.run("nft flush ruleset")
    if deleted:
        started.until(lambda: any(phase == "destroy" for _, phase in started.samples()))
    started.mark()
    return started


def needs_legacy(lacking: Callable[[str], NoReturn]) -> None:
    """Skip where the kernel was built without legacy tables."""
    done = subprocess.run(["modprobe", "iptable_filter"], capture_output=True, text=True, check=False)
    if done.returncode:
        lacking(done.stderr)


@pytest.mark.timeout(900)
def test_a_big_batch_adds_up(bench: Bench) -> None:
    """Parse and commit of 10,000 rules are the sendmsg's duration but for a tenth."""
    bench.run("nft -f -", TABLE)
    bench.run("nft list tables")  # a socket that only read is no tear-down
    assert bench.counts().get(("nftables", "teardown"), 1) == 1

    def once() -> tuple[float, Mapping[str, float]]:
        # One rule first: a batch that needs a module which is not loaded yet is aborted, and tried again by the kernel.
        bench.run("nft -f -", EMPTY + rules(1))
        bench.mark()
        took = bench.seconds_of("sendmsg", "nft -f -", rules())
        assert bench.counts() == {("nftables", phase): 1 for phase in bench.usual("parse", "commit")}
        return took, {phase: bench.seconds("nftables", phase) for phase in ("parse", "commit")}

    parts = fills(once)
    assert parts["parse"] > parts["commit"]
    assert bench.nothing_lost()


@pytest.mark.timeout(900)
def test_an_aborted_batch_is_an_abort(bench: Bench) -> None:
    """A batch whose last rule is wrong is parsed and aborted, never committed; a dry run likewise."""
    bench.run("nft -f -", TABLE + rules(1))
    wrong = rules() + "add rule ip t nowhere accept\n"

    def once() -> tuple[float, Mapping[str, float]]:
        bench.mark()
        took = bench.seconds_of("sendmsg", "nft -f -", wrong, fails=True)
        assert bench.counts() == {("nftables", phase): 1 for phase in bench.usual("parse", "abort")}
        return took, {phase: bench.seconds("nftables", phase) for phase in ("parse", "abort")}

    fills(once)
    bench.mark()
    bench.run("nft --check -f -", "add chain ip t d\n")
    assert bench.counts() == {("nftables", phase): 1 for phase in bench.usual("parse", "abort")}
    assert bench.nothing_lost()


def test_what_was_taken_out_is_destroyed_later(bench: Bench) -> None:
    """Deleted rules are let go in a worker; the sender's close waits for it."""
    bench.run("nft -f -", TABLE + rules(1000))
    bench.mark()
    took = bench.seconds_of("close", "nft -f -", "flush chain ip t c\n")
    bench.until(lambda: ("nftables", "destroy") in bench.samples())
    assert bench.samples()["nftables", "destroy"][0] == 1
    assert bench.counts() == {("nftables", phase): 1 for phase in bench.usual("parse", "commit")}
    if bench.has_teardown:
        teardown, destroy = bench.seconds("nftables", "teardown"), bench.seconds("nftables", "destroy")
        print(f"close {took:.6f} s, teardown {teardown:.6f} s, destroy {destroy:.6f} s")
        assert teardown <= took
    assert bench.nothing_lost()


@pytest.mark.parametrize("tool", ["iptables-legacy-restore", "ip6tables-legacy-restore"])
def test_every_replacement_is_counted(bench: Bench, tool: str, lacking: Callable[[str], NoReturn]) -> None:
    """23 runs of a legacy tool are 23 of each of its phases, and other tools' tables are not among them."""
    needs_legacy(lacking)
    bench.run(
        f"cat >/run/rules; for i in $(seq {RUNS}); do {tool} --noflush /run/rules || exit; done", LEGACY
    )
    bench.run("iptables-legacy -S; iptables-legacy-save; ip6tables-legacy -S")
    expected = {("iptables-legacy", phase): RUNS for phase in ("parse", "replace", "counters")}
    assert bench.counts() == expected
    bench.run("iptables-nft-restore --noflush", LEGACY)
    counts = bench.counts()
    assert {phase: counts[phase] for phase in expected} == expected
    assert counts["iptables-nft", "commit"] >= 1
    assert bench.nothing_lost()


@pytest.mark.timeout(900)
def test_a_big_table_adds_up(bench: Bench, lacking: Callable[[str], NoReturn]) -> None:
    """Parse, replace and counters of a legacy table with 10,000 rules are the setsockopt's duration but for a tenth."""
    needs_legacy(lacking)
    phases, text = ("parse", "replace", "counters"), big_table(RULES)

    def once() -> tuple[float, Mapping[str, float]]:
        bench.mark()
        took = bench.seconds_of("setsockopt", "iptables-legacy-restore", text)
        assert bench.counts() == {("iptables-legacy", phase): 1 for phase in phases}
        return took, {phase: bench.seconds("iptables-legacy", phase) for phase in phases}

    fills(once)
    assert bench.nothing_lost()


def test_another_namespaces_rewrites_do_not_count(bench: Bench) -> None:
    """What is written in a pod-like namespace is no phase of the node's, not even its destroy."""
    # From its first run on the worker is known.
    bench.run("nft -f -", "add table ip mine\n")
    bench.run("nft -f -", "delete table ip mine\n")
    bench.until(lambda: any(phase == "destroy" for _, phase in bench.samples()))
    bench.mark()
    with Namespace("pod") as pod:
        for text in (TABLE + rules(100), "flush chain ip t c\n", "delete table ip t\n"):
            pod.run(["nft", "-f", "-"], stdin=text)
    bench.run("nft -f -", "add table ip mine\n")
    assert bench.counts() == {("nftables", phase): 1 for phase in bench.usual("parse", "commit")}
    # Its worker has had the time by now: the others' tables were gone before ours came.
    assert not [phase for phase in bench.samples() if phase[1] == "destroy"]


def test_a_refused_table_is_only_parsed(bench: Bench, lacking: Callable[[str], NoReturn]) -> None:
    """A replacement that the kernel refuses is a parse without the rest."""
    needs_legacy(lacking)
    code = (
        "import socket,struct;"
        "s=socket.socket(socket.AF_INET,socket.SOCK_RAW,255);"
        "s.setsockopt(0,64,struct.pack('32s60x4x','filter'.encode())+bytes(64))"
    )
    bench.run(f'python3 -c "{code}" 2>/dev/null', fails=True)
    assert bench.counts() == {("iptables-legacy", "parse"): 1}
