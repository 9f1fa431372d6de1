# SPDX-License-Identifier: Apache-2.0
"""The daemon as a process: what it leaves behind, what it maps, and how it fails."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kptrace.experiments.daemon_process import DaemonProcess, DaemonRequest, default_command
from kptrace.experiments.netns import Namespace
from kptrace.experiments.scrape import fetch
from tests.native import traffic
from tests.native.lookup_bench import nft, nft_counter
from tests.native.nfqueue import HeldQueue

PORT = 5353
CHAIN = f"table ip t {{ chain c {{ type filter hook output priority -100; udp dport {PORT} counter; }}; }}"
NO_SERVICES = '{"apiVersion": "v1", "kind": "List", "items": []}'


@pytest.fixture
def daemon(namespace: Namespace, tmp_path: Path) -> Iterator[Callable[..., DaemonProcess]]:
    """Start daemons on the test's namespace; they end with the test."""
    started: list[DaemonProcess] = []

    def start(*extra: str) -> DaemonProcess:
        identity = tmp_path / "identity.json"
        identity.write_text(NO_SERVICES)
        request = DaemonRequest(namespace.path, identity, tmp_path / f"ready{len(started)}")
        argv = [*default_command(request), "--cache-dir", str(tmp_path / "cache"), "--sample", "all", *extra]
        process = DaemonProcess(argv, request.ready_file, tmp_path / f"log{len(started)}")
        process.__enter__()
        started.append(process)
        return process

    yield start
    for each in started:
        each.stop()


def until(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait for a condition; whether it came true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def bpf_objects(pid: int) -> int:
    """BPF programs, maps and links that bpftool says belong to a process."""
    count = 0
    for kind in ("prog", "map", "link"):
        listing = json.loads(
            subprocess.run(["bpftool", "-j", kind, "show"], capture_output=True, check=True).stdout
        )
        count += sum(1 for each in listing if any(owner["pid"] == pid for owner in each.get("pids", [])))
    return count


def netfilter_links() -> int:
    """All netfilter links of the machine."""
    listing = json.loads(
        subprocess.run(["bpftool", "-j", "link", "show"], capture_output=True, check=True).stdout
    )
    return sum(1 for each in listing if each["type"] in ("netfilter", 10))


def test_a_real_packet_reaches_metrics(daemon: Callable[..., DaemonProcess], namespace: Namespace) -> None:
    """The whole path: 23 packets, 23 in nft's counter, 23 in /metrics."""
    nft(namespace, CHAIN)
    process = daemon()

    def send() -> None:
        with traffic.udp_sink(socket.AF_INET, PORT):
            traffic.udp_one_flow(socket.AF_INET, PORT, 23)

    namespace.call(send)
    assert nft_counter(namespace, "c") == 23
    scrape = process.scrape()
    assert scrape.distribution("kptrace_lookup_duration_seconds", table="t", chain="c").count == 23


def test_a_killed_daemon_leaves_nothing(daemon: Callable[..., DaemonProcess], namespace: Namespace) -> None:
    """After SIGKILL no link is left, and traffic never stopped."""
    nft(namespace, CHAIN)
    before = netfilter_links()
    process = daemon()
    assert netfilter_links() > before
    os.kill(process.pid, signal.SIGKILL)

    def send() -> None:
        with traffic.udp_sink(socket.AF_INET, PORT):
            traffic.udp_one_flow(socket.AF_INET, PORT, 101)

    namespace.call(send)
    assert nft_counter(namespace, "c") == 101
    assert until(lambda: netfilter_links() == before, 5)


def test_a_deleted_namespace_is_let_go(daemon: Callable[..., DaemonProcess]) -> None:
    """The veth of a deleted namespace disappears within 5 s although kptrace watched the namespace."""
    with Namespace("gone") as gone:
        name = f"kv{os.getpid()}"
        subprocess.run(
            ["ip", "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", gone.name],
            check=True,
        )
        nft(gone, CHAIN)
        process = daemon("--netns", str(gone.path))
        assert Path(f"/sys/class/net/{name}").exists()
        gone.remove()
        assert until(lambda: not Path(f"/sys/class/net/{name}").exists(), 5)
        states = json.loads(fetch(process.port, "/status?format=json")[1])["signals"]
        assert any(row["reason"] == "namespace_ended" for row in states)


def test_the_daemon_never_maps_llvm(daemon: Callable[..., DaemonProcess], namespace: Namespace) -> None:
    """Neither LLVM nor BCC's library is in the daemon's address space."""
    nft(namespace, CHAIN)
    maps = Path(f"/proc/{daemon().pid}/maps").read_text()
    assert "libbcc" not in maps
    assert "LLVM" not in maps


def test_a_new_chain_is_measured_within_a_second(
    daemon: Callable[..., DaemonProcess], namespace: Namespace
) -> None:
    """A chain that appears after the start is bracketed within 1 s: the best of five, since others use the machine too."""
    process = daemon()
    took = []
    for number in range(5):
        table = f"t{number}"
        nft(
            namespace,
            CHAIN.replace("table ip t ", f"table ip {table} ").replace("-100", f"{-100 - 10 * number}"),
        )
        begin = time.monotonic()
        assert until(lambda: process.scrape().total("kptrace_bracket_info", member_table=table) == 1, 10)  # noqa: B023 - called at once
        took.append(time.monotonic() - begin)
    print(took)
    assert min(took) < 1


@pytest.mark.parametrize(
    ("extra", "code", "telling"),
    [
        (["--sample", "0"], 2, "not a divisor"),
        (["--listen", "nowhere"], 2, "ADDRESS:PORT"),
        (["--overhead-budget", "lots"], 2, "share of one core"),
        (["--netns", "/nonexistent"], 2, "network namespace"),
        (["--identity-file", "/nonexistent.yaml"], 5, "/nonexistent.yaml"),
        (["--config", "/nonexistent.toml"], 2, "/nonexistent.toml"),
    ],
)
def test_bad_input_is_one_line(extra: list[str], code: int, telling: str) -> None:
    """A wrong option ends with its documented exit code and one line that names it, never a traceback."""
    run = subprocess.run(
        [sys.executable, "-m", "kptrace", "run", "--listen", "127.0.0.1:0", "--cache-dir", "none", *extra],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == code, run.stderr
    assert telling in run.stderr
    assert "Traceback" not in run.stderr


def test_a_port_in_use_is_said() -> None:
    """Exit code 6 and the address where the port is taken."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        run = subprocess.run(
            [sys.executable, "-m", "kptrace", "run", "--listen", f"127.0.0.1:{port}", "--identity", "none"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert run.returncode == 6, run.stderr
    assert str(port) in run.stderr
    assert "Traceback" not in run.stderr


def run_briefly(*command: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run a daemon that is to fail at its start."""
    return subprocess.run(
        [*command, "--listen", "127.0.0.1:0", "--identity", "none", "--cache-dir", "none"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, **environment},
    )


def test_a_missing_capability_is_named() -> None:
    """Exit code 3, and the name of the capability."""
    setpriv = ["setpriv", "--bounding-set", "-net_admin", "--inh-caps", "-net_admin"]
    run = run_briefly(*setpriv, sys.executable, "-m", "kptrace", "run")
    assert run.returncode == 3, run.stderr
    assert "CAP_NET_ADMIN" in run.stderr
    assert "Traceback" not in run.stderr


def test_it_takes_no_cpu_from_the_writer(daemon: Callable[..., DaemonProcess]) -> None:
    """The daemon runs as a batch job, which the kernel lets preempt nobody when a commit wakes it."""
    assert os.sched_getscheduler(daemon().pid) == os.SCHED_BATCH


def test_a_kernel_without_btf_is_said(tmp_path: Path) -> None:
    """Exit code 4 where the mechanism that was asked for needs a BTF that is not there."""
    run = run_briefly(
        sys.executable, "-m", "kptrace", "run", "--lookup-mechanism", "bracket", "--sys-root", str(tmp_path)
    )
    assert run.returncode == 4, run.stderr
    assert "BTF" in run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize("mechanism", ["bracket", "auto"])
def test_a_missing_bcc_is_said(tmp_path: Path, mechanism: str) -> None:
    """Exit code 7 and the package to install where BCC is not there."""
    (tmp_path / "bcc.py").write_text("raise ModuleNotFoundError(\"No module named 'bcc'\", name='bcc')\n")
    argv = [sys.executable, "-m", "kptrace", "run", "--lookup-mechanism", mechanism, "--cache-dir", "none"]
    run = run_briefly(*argv, "--listen", "127.0.0.1:0", PYTHONPATH=str(tmp_path))
    assert run.returncode == 7, run.stderr
    assert "python3-bpfcc" in run.stderr
    assert "Traceback" not in run.stderr


def test_a_kernel_that_can_do_nothing_is_said(tmp_path: Path, namespace: Namespace) -> None:
    """With automatic choice, exit code 4 and one line that names what each mechanism lacks."""
    (tmp_path / "sys").mkdir()
    argv = default_command(DaemonRequest(namespace.path, tmp_path / "none.json", tmp_path / "ready"))
    (tmp_path / "none.json").write_text(NO_SERVICES)
    run = run_briefly(*argv, "--cache-dir", "none", "--sys-root", str(tmp_path / "sys"))
    assert run.returncode == 4, run.stderr
    (line,) = [line for line in run.stderr.splitlines() if line.startswith("kptrace: ")]
    assert "bracket: no BTF" in line
    assert "tracepoint: no BTF" in line
    assert "Traceback" not in run.stderr


def test_without_a_mechanism_the_rest_goes_on(
    daemon: Callable[..., DaemonProcess], namespace: Namespace
) -> None:
    """In a namespace with an NFQUEUE look-ups are not measured, /status and metrics say so, and rewrites are."""
    with namespace.call(lambda: HeldQueue(7)):
        process = daemon()
        nft(namespace, CHAIN)
        row = {"signal": "lookup", "mechanism": "bracket", "state": "unavailable"}
        rewrites = "kptrace_rewrite_duration_seconds_count"
        assert until(lambda: process.scrape().total(rewrites, outcome="committed") == 1, 5)
        assert process.scrape().total("kptrace_signal_state", reason="nfqueue_present", **row) == 1
        states = json.loads(fetch(process.port, "/status?format=json")[1])["signals"]
        (found,) = [each for each in states if (each["signal"], each["mechanism"]) == ("lookup", "bracket")]
        assert (found["state"], found["reason"]) == ("unavailable", "nfqueue_present")
