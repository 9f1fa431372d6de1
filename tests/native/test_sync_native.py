# SPDX-License-Identifier: Apache-2.0
"""A writer's run on the machine's own kernel: its processes, command lines and exits, against what its parent saw."""

import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from kptrace.experiments.netns import Namespace
from kptrace.kernel.bytecode import Bytecode
from kptrace.kernel.compile import Compiler
from kptrace.kernel.netns import NetworkNamespace
from kptrace.model.rewrite import Outcome, ProcessRun
from kptrace.signals import rewrite_kernel
from kptrace.signals.process_kernel import REQUEST, ProcessKernel
from kptrace.signals.process_records import Exec, Exit, decode
from kptrace.signals.processes import ProcessTable, read_process
from kptrace.signals.sync_events import Phase, Sync
from kptrace.signals.sync_signal import SyncSignal
from kptrace.signals.writers import Writers
from tests.native.rewrite_bench import RewriteBench

pytestmark = pytest.mark.native
EXECS = 23
PROC = Path("/proc")


@dataclass
class Compiled:
    """Programs: of processes for this kernel and for one without bpf_rdonly_cast(), and of rewrites."""

    new: Bytecode
    old: Bytecode
    rewrite: Bytecode


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    """All of them, in one go."""
    older = {name: fact for name, fact in REQUEST.facts.items() if name != "KPT_KFUNC_RDONLY_CAST"}
    built = Compiler(Path("/sys/kernel/btf/vmlinux"), None).build_each(
        [REQUEST, replace(REQUEST, facts=older), rewrite_kernel.REQUEST]
    )
    assert all(isinstance(each, Bytecode) for each in built), built
    new, old, rewrite = (each for each in built if isinstance(each, Bytecode))
    return Compiled(new, old, rewrite)


Watch = Callable[[Bytecode], tuple[ProcessKernel, list[Exec | Exit]]]


@pytest.fixture
def watch() -> Iterator[Watch]:
    """Record processes from now on."""
    kernels: list[ProcessKernel] = []

    def start(bytecode: Bytecode) -> tuple[ProcessKernel, list[Exec | Exit]]:
        records: list[Exec | Exit] = []

        def take(data: bytes) -> None:
            record = decode(data)
            assert record is not None
            records.append(record)

        kernels.append(ProcessKernel(bytecode, take))
        kernels[-1].attach()
        return kernels[-1], records

    yield start
    for each in kernels:
        each.close()


@pytest.mark.parametrize("form", ["new", "old"])
def test_every_program_and_its_end_is_told(compiled: Compiled, watch: Watch, form: str) -> None:
    """A prime number of them, with path, parent, exit status and, of a tool, its arguments."""
    kernel, records = watch(getattr(compiled, form))
    nft = shutil.which("nft")
    assert nft
    pids = [
        subprocess.Popen([nft, "--json", "list", "table", "ip", f"t{n}"], stderr=subprocess.DEVNULL)
        for n in range(EXECS)
    ]
    codes = {each.pid: each.wait() for each in pids}
    shell = subprocess.Popen(["/bin/sh", "-c", "kill -9 $$", "secret"])
    shell.wait()
    kernel.consume()
    found = {each.tgid: each for each in records if isinstance(each, Exec)}
    ends = {each.tgid: each for each in records if isinstance(each, Exit)}
    for n, process in enumerate(pids):
        assert found[process.pid].arguments == (nft, "--json", "list", "table", "ip", f"t{n}")
        assert found[process.pid].filename == nft
        assert ends[process.pid].status == codes[process.pid] << 8
        assert found[process.pid].at_ns < ends[process.pid].at_ns
    assert len({each.parent for each in (found[process.pid] for process in pids)}) == 1
    assert (found[shell.pid].arguments, ends[shell.pid].status) == (None, 9)
    assert set(kernel.losses().values()) == {0}


@dataclass
class Bench:
    """A sync signal on a namespace, fed by both rings as the daemon will feed it."""

    compiled: Compiled
    namespace: Namespace
    watch: Watch
    syncs: list[Sync] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Attach."""
        self.netns = NetworkNamespace(self.namespace.path)
        self.table = ProcessTable(lambda tgid: read_process(PROC, tgid))
        self.rewrites = RewriteBench(self.compiled.rewrite, self.namespace)
        self.kernel, self.records = self.watch(self.compiled.new)
        self.signal = SyncSignal(self.netns.inode, lambda: self.table, Writers(), on_sync=self.syncs.append)

    def settle(self) -> None:
        """Up to now; processes first, then rewrites."""
        until = time.monotonic_ns()
        self.rewrites.settle()
        self.kernel.consume()
        records, self.records[:] = list(self.records), []
        for record in records:
            if isinstance(record, Exec):
                self.table._remember(_run(record))
            self.signal.process(record)
        commits, self.rewrites.commits[:] = list(self.rewrites.commits), []
        for commit in commits:
            self.signal.rewrite(commit)
        self.signal.settle(until)
        self.signal.tick()

    def until(self, count: int) -> None:
        """Wait for so many syncs."""
        end = time.monotonic() + 30
        while len(self.syncs) < count:
            assert time.monotonic() < end, self.syncs
            self.settle()
            time.sleep(0.05)

    def close(self) -> None:
        """Detach."""
        self.rewrites.close()
        self.netns.close()


def _run(record: Exec) -> ProcessRun:
    return ProcessRun(record.tgid, record.parent, record.at_ns, record.comm, record.filename)


@pytest.fixture
def bench(compiled: Compiled, namespace: Namespace, watch: Watch) -> Iterator[Bench]:
    """A running signal."""
    made = Bench(compiled, namespace, watch)
    yield made
    made.close()


def test_a_run_like_kube_proxys(bench: Bench, namespace: Namespace, tmp_path: Path) -> None:
    """List, a pause, and a write: the phases lie where its parent has them, and add up; a failure is one."""
    proxy = tmp_path / "kube-proxy"
    shutil.copy2(str(shutil.which("bash")), proxy)
    rules = tmp_path / "rules"
    rules.write_text(
        "add table ip kube-proxy\n" + "".join(f"add chain ip kube-proxy c{n}\n" for n in range(500))
    )
    script = f"""
        nft --json list table ip kube-proxy 2>/dev/null
        sleep 0.3
        nft -f {rules}
        sleep 1
        nft --json --terse list table ip kube-proxy >/dev/null
        nft -f - <<< 'add rule ip kube-proxy nowhere counter' 2>/dev/null
        true
    """
    with namespace.enter():
        started = time.monotonic_ns()
        subprocess.run([str(proxy), "-c", script], check=True)
        ended = time.monotonic_ns()
    bench.until(2)
    first, second = bench.syncs
    assert [each.writer for each in bench.syncs] == ["kube-proxy", "kube-proxy"]
    assert [each.outcome for each in bench.syncs] == [Outcome.COMMITTED, Outcome.FAILED]
    assert (first.dataplane, first.family, first.processes, first.complete) == ("nftables", "ipv4", 2, True)
    assert sum(first.phases.values()) == first.duration_ns
    assert first.phases[Phase.COMPUTE] >= 300_000_000
    assert {Phase.LIST, Phase.WRITE, Phase.COMMIT, Phase.TEARDOWN} <= first.phases.keys()
    assert started < first.begin_ns < first.end_ns < second.begin_ns < second.end_ns < ended
