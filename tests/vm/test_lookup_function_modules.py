# SPDX-License-Identifier: Apache-2.0
"""Modules that come and go under fentry and kprobes, and daemons that are killed."""

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kptrace.experiments.netns import Namespace
from kptrace.signals.sampling import Sampling
from tests.native import traffic
from tests.vm.function_bench import FunctionBench, loaded, modprobe
from tests.vm.test_lookup_function import MECHANISMS, PORT

MODULE, FILTER = "ip6_tables", "ip6table_filter"
_LONGEST_SECONDS = 60.0
_KILLED = """
import sys
from pathlib import Path
from kptrace.experiments.netns import Namespace
from tests.vm.function_bench import FunctionBench

class Given(Namespace):
    path = None
    def __init__(self, path): self.path = Path(path)

bench = FunctionBench(sys.argv[1], Given(sys.argv[2]))
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    """The watched namespace."""
    with Namespace("host") as made:
        yield made


def unload() -> "subprocess.CompletedProcess[str]":
    """Take the module away, after those that use it."""
    users = sorted(path.name for path in Path("/sys/module", MODULE, "holders").glob("*"))
    return modprobe("-r", *users, MODULE)


def send(namespace: Namespace, packets: int) -> None:
    """Datagrams through ip6tables' filter table, which a rule makes sure is there; a rule that stays pins the module."""
    namespace.run(["ip6tables-legacy", "-A", "OUTPUT", "-p", "udp", "-j", "ACCEPT"])

    def run() -> None:
        with traffic.udp_sink(socket.AF_INET6, PORT):
            traffic.udp_one_flow(socket.AF_INET6, PORT, packets)

    namespace.call(run)
    namespace.run(["ip6tables-legacy", "-F", "OUTPUT"])


def attached(bench: FunctionBench, function: str = "ip6t_do_table") -> bool:
    """Whether the function has its programs."""
    return any(each.name == function for each in bench.signal._follower.attached)


def count(bench: FunctionBench) -> int:
    """Samples of ip6tables' chain at OUTPUT."""
    return bench.count(dataplane="iptables-legacy", family="ipv6", table="filter", chain="OUTPUT")


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_a_module_that_comes_later_is_followed(mechanism: str, namespace: Namespace) -> None:
    """The function is attached to after its module came; fentry pins the module and says so, a kprobe lets it go."""
    if loaded(MODULE):
        assert unload().returncode == 0
    modprobe("ip_tables")
    bench = FunctionBench(mechanism, namespace)  # type: ignore[arg-type]
    try:
        assert not attached(bench)
        assert f"ip6t_do_table: waits for the module {MODULE}" in bench.state().detail
        for round_number in (1, 2):
            assert modprobe(FILTER).returncode == 0
            began = time.monotonic()
            bench.follow_until(lambda: attached(bench))
            print(
                f"{mechanism}: attached {time.monotonic() - began:.1f} emulated seconds after the module came"
            )
            send(namespace, 23)
            assert count(bench) == 23 * round_number
            gone = unload()
            if mechanism == "fentry":
                assert gone.returncode != 0
                assert loaded(MODULE)
                assert f"pins the module {MODULE}" in bench.state().detail
                break
            assert gone.returncode == 0, gone.stderr
            bench.signal.tick()
            bench.signal.tick()
            assert not attached(bench)
            assert bench.state().reason in ("ok", "no_module_btf")
            assert count(bench) == 23 * round_number
    finally:
        bench.close()
    if loaded(MODULE):
        assert unload().returncode == 0


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_nothing_outlives_a_killed_process(mechanism: str, namespace: Namespace) -> None:
    """After SIGKILL there is no program, no link and no kprobe left."""
    modprobe("-a", "nf_tables", "ip_tables", "ip6_tables")
    with subprocess.Popen(
        [sys.executable, "-c", _KILLED, mechanism, str(namespace.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout is not None
        lines = iter(child.stdout.readline, "")
        assert any(line == "ready\n" for line in lines)
        assert programs()
        child.send_signal(signal.SIGKILL)
        child.wait()
    ends = time.monotonic() + _LONGEST_SECONDS
    while programs() or kprobes():
        assert time.monotonic() < ends, (programs(), kprobes())
        time.sleep(0.2)
    assert unload().returncode == 0


def programs() -> list[str]:
    """Names of kptrace's programs in the kernel."""
    shown = json.loads(
        subprocess.run(["bpftool", "-j", "prog", "list"], capture_output=True, check=True).stdout
    )
    names = {"nft_enter", "nft_leave", "table_enter", "table_leave"}
    return [each["name"] for each in shown if each.get("name") in names]


def kprobes() -> str:
    """All kprobes of the kernel, those in tracefs too; a lockdown that shows neither allows none."""
    if not Path("/sys/kernel/tracing/events").is_dir():
        subprocess.run(["mount", "-t", "tracefs", "none", "/sys/kernel/tracing"], check=False)
    if not Path("/sys/kernel/debug/kprobes").is_dir():
        subprocess.run(["mount", "-t", "debugfs", "none", "/sys/kernel/debug"], check=False)
    try:
        listed = Path("/sys/kernel/debug/kprobes/list").read_text()
        return listed + Path("/sys/kernel/tracing/kprobe_events").read_text()
    except (PermissionError, FileNotFoundError):
        assert "[confidentiality]" in Path("/sys/kernel/security/lockdown").read_text()
        return ""


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_sampling_thins_what_does_not_walk_nat(mechanism: str, namespace: Namespace) -> None:
    """Of packets that walk no NAT one in 16 is timed, more or less."""
    modprobe("-a", "ip6_tables")
    bench = FunctionBench(mechanism, namespace, Sampling(1, 16))  # type: ignore[arg-type]
    try:
        send(namespace, 4_000)
        assert 150 < count(bench) < 400
        ratios = next(f for f in bench.signal.families() if f.spec.name == "kptrace_sampling_ratio")
        assert [sample.value for sample in ratios.samples if hasattr(sample, "value")] == [1.0, 1 / 16]
    finally:
        bench.close()
