# SPDX-License-Identifier: Apache-2.0
"""Writers that list by netlink themselves, on the machine's own kernel, against strace of the writer."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

import pytest

from kptrace.daemon.loop import Loop
from kptrace.experiments.daemon_process import DaemonProcess, DaemonRequest, default_command
from kptrace.experiments.netns import Namespace
from kptrace.experiments.scrape import fetch
from kptrace.kernel.bytecode import Bytecode
from kptrace.kernel.compile import Compiler, Request
from kptrace.kernel.netns import NetworkNamespace
from kptrace.model.rewrite import Outcome
from kptrace.signals.clocks import unix_ns
from kptrace.signals.process_kernel import REQUEST as PROCESS_REQUEST
from kptrace.signals.process_watch import ProcessWatch
from kptrace.signals.rewrite import RewriteSignal
from kptrace.signals.rewrite_kernel import REQUEST
from kptrace.signals.rewrite_requests_records import Requests, Subsystem
from kptrace.signals.sync_events import Phase, Sync
from kptrace.signals.sync_signal import SyncSignal
from kptrace.signals.task_facts import RDONLY_CAST
from kptrace.signals.writers import Writers
from tests.native.programs import program_ids

pytestmark = pytest.mark.native
CHAINS, FLOWS = 1009, 101
PATIENCE_SECONDS = 30.0
#: The clocks' offset is read anew at each conversion.
CLOCKS_NS = 50_000
RECEIVES = ("enter_receive",)
_WRITER = Path(__file__).with_name("netlink_writer.py")
_ROOT = _WRITER.parents[2]


class Writer:
    """The writer as a process called kube-proxy in a namespace; a context manager."""

    def __init__(self, namespace: Namespace, folder: Path, log: Path | None = None) -> None:
        program = folder / "kube-proxy"
        shutil.copy2(os.path.realpath(sys.executable), program)
        calls = "trace=execve,sendto,sendmsg,recvfrom,recvmsg,write"
        trace = ["strace", "-f", "-ttt", "-T", "-e", calls, "-o", str(log)] if log else []
        environment = {**os.environ, "PYTHONPATH": str(_ROOT), "PYTHONHOME": sys.base_prefix}
        with namespace.enter():
            self.process = subprocess.Popen(
                [*trace, str(program), "-u", str(_WRITER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(PATIENCE_SECONDS)

    def do(self, *steps: str) -> list[str]:
        """Take steps; what each said."""
        assert self.process.stdin and self.process.stdout
        said = []
        for step in steps:
            self.process.stdin.write(f"{step}\n")
            self.process.stdin.flush()
            said.append(self.process.stdout.readline().strip())
        return said


@dataclass(frozen=True)
class Call:
    """A line of strace's, in Unix nanoseconds; it ended before `next_ns`: every step of the writer ends with a write."""

    name: str
    begin_ns: int
    result: int
    next_ns: int


def calls(log: Path, since_ns: int) -> list[Call]:
    """The writer's own calls on its netlink sockets since a moment."""
    lines = re.findall(r"^(\d+) +(\d+)\.(\d{6}) (\w+)\((.*)$", log.read_text(), re.MULTILINE)
    pid = lines[0][0]
    own = [
        ((int(seconds) * 10**6 + int(micros)) * 1000, name, rest)
        for who, seconds, micros, name, rest in lines
        if who == pid
    ]
    ends = [stamp for stamp, _, _ in own[1:]] + [time.time_ns()]
    found = []
    for (stamp, name, rest), end in zip(own, ends, strict=True):
        result = re.search(r" = (-?\d+)", rest)
        if stamp >= since_ns and result and name not in ("execve", "write"):
            found.append(Call(name, stamp, int(result[1]), end))
    return found


@dataclass
class Bench:
    """The rewrite and sync signals on a namespace, wired and ticked as the daemon does it."""

    bytecode: tuple[Bytecode, Bytecode]
    namespace: Namespace
    syncs: list[Sync] = field(default_factory=list)
    told: list[Requests] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Attach."""
        rewrite, process = self.bytecode
        self.loop = Loop()
        self.netns = NetworkNamespace(self.namespace.path)
        self.watch = ProcessWatch(process)
        self.sync = SyncSignal(self.netns.inode, lambda: self.watch.table, Writers(), on_sync=self._synced)
        self.watch.start([self.sync.process])
        self.rewrite = RewriteSignal(
            rewrite,
            self.netns,
            self.loop,
            processes=self.watch.consume,
            on_rewrite=self.sync.rewrite,
            on_requests=self._asked,
        )
        self.rewrite.start()

    def _synced(self, sync: Sync) -> None:
        if sync.writer != "other":  # the test's own preparations
            self.syncs.append(sync)

    def _asked(self, requests: Requests) -> None:
        asker = requests.asker
        phase = Phase.LIST if asker.subsystem is Subsystem.NFTABLES else Phase.CONNTRACK
        self.told.append(requests)
        self.sync.span(asker.tgid, phase, requests.begin_ns, requests.end_ns, asker.family)

    def tick(self) -> None:
        """Everything up to now."""
        until = time.monotonic_ns()
        self.rewrite.consume()
        self.watch.consume()
        self.sync.settle(until)
        self.sync.tick()

    def until(self, condition: Callable[[], bool]) -> None:
        """Tick until something is so."""
        end = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            assert time.monotonic() < end, (self.syncs, self.told)
            self.tick()
            time.sleep(0.02)

    @property
    def status(self) -> dict[str, object]:
        """What /status would show of requests."""
        section = self.rewrite.status(names=True)["netlink_requests"]
        assert isinstance(section, dict)
        return section

    def lost(self) -> int:
        """Whatever was lost."""
        return sum(self.rewrite.losses().values())

    def close(self) -> None:
        """Detach."""
        self.rewrite.close()
        self.watch.close()
        self.loop.close()
        self.netns.close()


@pytest.fixture(scope="module", params=["new", "old"])
def bytecode(request: pytest.FixtureRequest) -> tuple[Bytecode, Bytecode]:
    """The programs for this kernel, and for one without bpf_rdonly_cast(), which v6.2 brought."""

    def form(wanted: Request) -> Request:
        facts = {name: fact for name, fact in wanted.facts.items() if name != RDONLY_CAST}
        return wanted if request.param == "new" else replace(wanted, facts=facts)

    compiler = Compiler(Path("/sys/kernel/btf/vmlinux"), None)
    rewrite, process = compiler.build_each([form(REQUEST), form(PROCESS_REQUEST)])
    assert isinstance(rewrite, Bytecode), rewrite
    assert isinstance(process, Bytecode), process
    return rewrite, process


@pytest.fixture
def bench(bytecode: tuple[Bytecode, Bytecode], namespace: Namespace) -> Iterator[Bench]:
    """Running signals."""
    made = Bench(bytecode, namespace)
    yield made
    made.close()


@pytest.fixture
def rules(namespace: Namespace, tmp_path: Path) -> Path:
    """kube-proxy's table with many chains in it; a file that adds one more."""
    whole, one = tmp_path / "whole", tmp_path / "one"
    chains = "".join(f"add chain ip kube-proxy c{n}\n" for n in range(CHAINS))
    whole.write_text("add table ip kube-proxy\n" + chains)
    one.write_text("add chain ip kube-proxy one\nadd rule ip kube-proxy one counter\n")
    namespace.run(["nft", "-f", str(whole)])
    return one


def flows(namespace: Namespace) -> None:
    """Connections for a writer to delete."""
    for n in range(FLOWS):
        words = "conntrack -I -p udp -s 10.1.0.1 -d 10.1.0.2 --dport 53 --timeout 600 --sport"
        namespace.run([*words.split(), str(1024 + n)])


def followed(bench: Bench, writer: Writer) -> None:
    """Let the writer be known by a first list, and rest until that is no run of the next one's."""
    writer.do("list ipv4 sendmsg")
    assert bench.status["receives"] != "attached"
    bench.until(lambda: bench.status["receives"] == "attached")
    assert [each.begin_ns == each.end_ns for each in bench.told] == [True]
    writer.do("pause 0.6", "run nft --json list table ip kube-proxy", "run nft -f /dev/null")
    bench.until(lambda: len(bench.syncs) > 0)
    bench.syncs.clear()


@pytest.mark.parametrize("how", ["sendmsg", "sendto"])
def test_a_list_by_netlink_is_the_runs_list(
    bench: Bench, namespace: Namespace, rules: Path, tmp_path: Path, how: str
) -> None:
    """From the entry of the first dump to the last receive with data, by strace; then nft's write."""
    log = tmp_path / "log"
    with Writer(namespace, tmp_path, log) as writer:
        followed(bench, writer)
        since = time.time_ns()
        (messages, *_) = writer.do(f"list ipv4 {how}", "pause 0.2", f"write {rules}")
        bench.until(lambda: len(bench.syncs) > 0)
    assert int(messages) == CHAINS
    (sync,) = bench.syncs
    assert (sync.writer, sync.family, sync.outcome) == ("kube-proxy", "ipv4", Outcome.COMMITTED)
    assert (sync.processes, sync.complete, len(sync.commits)) == (1, True, 1)
    traced = calls(log, since)
    sends = [each for each in traced if each.name == how]
    receives = [each for each in traced if each.name.startswith("recv") and each.result > 0]
    assert len(sends) == 3
    list_end = sync.begin_ns + sync.phases[Phase.LIST]
    assert sends[0].begin_ns <= unix_ns(sync.begin_ns) + CLOCKS_NS
    assert unix_ns(sync.begin_ns) <= sends[0].next_ns + CLOCKS_NS
    assert receives[-1].begin_ns <= unix_ns(list_end) + CLOCKS_NS
    assert unix_ns(list_end) <= receives[-1].next_ns + CLOCKS_NS
    assert {Phase.WRITE, Phase.COMMIT, Phase.TEARDOWN} <= sync.phases.keys()
    assert sync.phases[Phase.COMPUTE] >= 200_000_000
    assert sum(sync.phases.values()) == sync.duration_ns
    assert list_end + sync.phases[Phase.COMPUTE] <= sync.commits[0].begin_ns
    assert bench.lost() == 0


def test_connections_deleted_by_netlink_are_the_runs_clean_up(
    bench: Bench, namespace: Namespace, rules: Path, tmp_path: Path
) -> None:
    """After the write: two dumps and a deletion each, from the first request to the last answer, by strace."""
    flows(namespace)
    log = tmp_path / "log"
    with Writer(namespace, tmp_path, log) as writer:
        followed(bench, writer)
        writer.do("list ipv4 sendmsg", f"write {rules}")
        since = time.time_ns()
        assert writer.do("clean") == [str(FLOWS)]
        bench.until(lambda: len(bench.syncs) > 0)
    (sync,) = bench.syncs
    traced = calls(log, since)
    assert sum(each.name == "sendto" for each in traced) == 2 + FLOWS
    begin = sync.end_ns - sync.phases[Phase.CONNTRACK]
    assert traced[0].begin_ns <= unix_ns(begin) + CLOCKS_NS
    assert unix_ns(begin) <= traced[0].next_ns + CLOCKS_NS
    assert traced[-1].begin_ns <= unix_ns(sync.end_ns) + CLOCKS_NS
    assert unix_ns(sync.end_ns) <= traced[-1].next_ns + CLOCKS_NS
    assert {Phase.LIST, Phase.WRITE, Phase.COMMIT} <= sync.phases.keys()
    assert sum(sync.phases.values()) == sync.duration_ns
    assert bench.lost() == 0


def test_a_process_that_lists_beside_it_changes_nothing(
    bench: Bench, namespace: Namespace, rules: Path, tmp_path: Path
) -> None:
    """An `nft list` of the writer's own is of the same list, and one of somebody else's is of no run."""
    with Writer(namespace, tmp_path) as writer:
        followed(bench, writer)
        namespace.run(["nft", "list", "ruleset"])
        writer.do("list ipv4 sendmsg", "run nft --json list table ip kube-proxy", f"write {rules}")
        namespace.run(["nft", "list", "ruleset"])
        bench.until(lambda: len(bench.syncs) > 0)
        assert bench.status["followed"] == [writer.process.pid]
    (sync,) = bench.syncs
    assert (sync.processes, len(sync.commits)) == (2, 1)
    assert sync.phases[Phase.LIST] < sync.duration_ns


def test_families_that_are_listed_at_once_are_told_apart(
    bench: Bench, namespace: Namespace, rules: Path, tmp_path: Path
) -> None:
    """Each dump names its family; receives between them are those of their own socket."""
    with Writer(namespace, tmp_path) as writer:
        followed(bench, writer)
        del bench.told[:]
        writer.do("list ipv4 sendmsg", "list ipv6 sendto")
        bench.until(lambda: {each.asker.family for each in bench.told} == {"ipv4", "ipv6"})
    first, *_, last = sorted(bench.told, key=lambda each: each.begin_ns)
    assert (first.asker.family, last.asker.family) == ("ipv4", "ipv6")
    ends = max(each.end_ns for each in bench.told if each.asker.family == "ipv4")
    assert ends <= min(each.begin_ns for each in bench.told if each.asker.family == "ipv6")


def test_a_writer_that_ended_is_forgotten(bench: Bench, namespace: Namespace, tmp_path: Path) -> None:
    """And its place is free."""
    with Writer(namespace, tmp_path) as writer:
        writer.do("list ipv4 sendmsg")
        bench.until(lambda: bench.status["followed"] == [writer.process.pid])
    bench.until(lambda: bench.status["followed"] == [])


def requests_section(daemon: DaemonProcess) -> dict[str, object]:
    """The daemon's /status about requests."""
    section = json.loads(fetch(daemon.port, "/status?format=json")[1])["netlink_requests"]
    assert isinstance(section, dict)
    return section


def wait(condition: Callable[[], bool]) -> None:
    """Until something is so."""
    end = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_receives_are_traced_only_where_a_writer_asks_itself(
    namespace: Namespace, rules: Path, tmp_path: Path
) -> None:
    """The real daemon: not for tools, nor for strangers, nor for a kube-proxy elsewhere; then for kube-proxy."""
    identity = tmp_path / "identity.json"
    identity.write_text('{"apiVersion": "v1", "kind": "List", "items": []}')
    request = DaemonRequest(namespace.path, identity, tmp_path / "ready")
    before = program_ids(RECEIVES)
    with DaemonProcess(default_command(request), request.ready_file, tmp_path / "log") as daemon:
        shell = tmp_path / "elsewhere"
        shell.mkdir()
        with Namespace("pod") as pod, Writer(pod, shell) as stranger:
            stranger.do("list ipv4 sendmsg")
            namespace.run(["nft", "list", "ruleset"])
            steps: Sequence[str] = (sys.executable, str(_WRITER))
            with namespace.enter():
                subprocess.run(
                    steps, input="list ipv4 sendto\n", text=True, check=True,
                    env={**os.environ, "PYTHONPATH": str(_ROOT)}, stdout=subprocess.DEVNULL,
                )  # fmt: skip
            # A run of nft's after it: when that is told of, all before was looked at.
            namespace.run(["nft", "-f", str(rules)])
            daemon.scrape_until(lambda now: now.total("kptrace_sync_duration_seconds_count") > 0, seconds=30)
            assert requests_section(daemon)["followed"] == []
            assert program_ids(RECEIVES) == before
        with Writer(namespace, tmp_path) as writer:
            writer.do("list ipv4 sendmsg")
            wait(
                lambda: requests_section(daemon) == {"receives": "attached", "followed": [writer.process.pid]}
            )
            assert len(program_ids(RECEIVES) - before) == 1
            writer.do("pause 0.6", "list ipv4 sendmsg", f"write {rules}")
            phases = "kptrace_sync_phase_duration_seconds"
            scrape = daemon.scrape_until(
                lambda now: now.distribution(phases, phase="list", writer="kube-proxy").count > 0, seconds=40
            )
        whole = scrape.total("kptrace_sync_duration_seconds_sum", writer="kube-proxy", outcome="committed")
        assert scrape.total(f"{phases}_sum", writer="kube-proxy") == pytest.approx(whole, rel=0.05)
        for reason in ("requests_full", "writer_not_followed", "requests_undecodable"):
            assert scrape.total("kptrace_events_lost_total", reason=reason) == 0
    assert not program_ids(RECEIVES) - before
