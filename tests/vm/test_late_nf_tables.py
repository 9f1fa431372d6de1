# SPDX-License-Identifier: Apache-2.0
"""A daemon that is there before nf_tables, as on a node whose kube-proxy starts later."""

import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from kptrace.experiments.daemon_process import DaemonProcess
from kptrace.experiments.netns import Namespace
from kptrace.experiments.scrape import fetch
from kptrace.kernel.btf import Btf
from tests.native.lookup_bench import nft
from tests.vm.daemons import PORT, READY_SECONDS, running
from tests.vm.function_bench import loaded, modprobe

MODULE = "nf_tables"
CHAIN = f"table ip t {{ chain c {{ type filter hook output priority 0; udp dport {PORT} accept; }}; }}"
#: From the module's coming to the first look-up in /metrics, on a machine that is no slower than the slowest node.
WITHIN_SECONDS = 5.0
#: What indexing the kernel's BTF may take on a node (tests/native/test_btf_native.py).
INDEXING_SECONDS = 0.4
#: Of which one must be so: a host that is busy makes it longer and never shorter.
ATTEMPTS = 3
#: For what the machine does in its own time.
_PATIENCE_SECONDS = 60.0
# What the test does takes the CPU from the daemon: emulated ones share one of the host's.
_PAUSE_SECONDS = 0.25
_LOADER = Path("/proc/sys/kernel/modprobe")


@pytest.fixture
def only_by_hand(lacking: Callable[[str], NoReturn]) -> Iterator[None]:
    """Asking for nf_tables does not load it, as the daemon itself would."""
    modprobe(MODULE)
    if not loaded(MODULE):
        lacking(f"{MODULE} is no module here")
    if not Path("/sys/kernel/btf", MODULE).exists():
        lacking(f"/sys/kernel/btf/{MODULE} is not there")
    before = _LOADER.read_text()
    _LOADER.write_text("/bin/false")
    yield
    _LOADER.write_text(before)


@pytest.fixture
def flow(namespace: Namespace) -> Iterator[None]:
    """A packet now and then, all the time; nobody listens."""
    over = threading.Event()

    def run() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            while not over.wait(_PAUSE_SECONDS):
                sender.sendto(b"k", ("127.0.0.1", PORT))

    thread = threading.Thread(target=namespace.call, args=(run,))
    thread.start()
    yield
    over.set()
    thread.join()


def unload(module: str) -> None:
    """Take a module away after those that use it, if nothing else does."""
    for user in Path("/sys/module", module, "holders").glob("*"):
        unload(user.name)
    subprocess.run(["rmmod", module], capture_output=True, check=False)


def until(condition: Callable[[], bool], seconds: float, what: Callable[[], str]) -> None:
    """Wait for something to be so."""
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, what()
        time.sleep(_PAUSE_SECONDS)


def gone() -> bool:
    """Whether nf_tables is, or is now: namespaces that are deleted hold it for a while."""
    if loaded(MODULE):
        unload(MODULE)
    return not loaded(MODULE)


def seen(process: DaemonProcess) -> int:
    """The chain's look-ups."""
    found = process.scrape().distribution("kptrace_lookup_duration_seconds", table="t", chain="c")
    return found.count


def slowness() -> float:
    """How many times slower than the slowest node this machine is now: it shares the host with others."""
    begin = time.monotonic()
    Btf.load(Path("/sys/kernel/btf/vmlinux"))
    return max(1.0, (time.monotonic() - begin) / INDEXING_SECONDS)


def settled(process: DaemonProcess) -> bool:
    """Whether the daemon has started everything: what it compiles after it is ready takes a minute here."""
    return process.scrape().total("kptrace_signal_state", reason="starting") == 0


@pytest.mark.timeout(900)
@pytest.mark.usefixtures("only_by_hand", "flow")
@pytest.mark.parametrize(
    "mechanism",
    [
        pytest.param(name, marks=pytest.mark.promised("lookup", name), id=name)
        for name in ("bracket", "fentry", "kprobe")
    ],
)
def test_look_ups_appear_within_seconds_of_the_module(
    namespace: Namespace, tmp_path: Path, mechanism: str
) -> None:
    """From nf_tables' coming, and with it a chain, to the first look-up in /metrics it is 5 s at most."""
    took: list[float] = []
    while not took or (took[-1] > WITHIN_SECONDS and len(took) < ATTEMPTS):
        until(gone, _PATIENCE_SECONDS, Path("/proc/modules").read_text)
        (folder := tmp_path / str(len(took))).mkdir()
        with running(namespace, folder, "--lookup-mechanism", mechanism, "--sample", "all") as process:
            until(lambda: settled(process), READY_SECONDS, lambda: fetch(process.port, "/status")[1])
            slow = slowness()
            assert not loaded(MODULE)
            done = modprobe(MODULE)
            came = time.monotonic()
            assert done.returncode == 0, done.stderr
            nft(namespace, CHAIN)
            filled = time.monotonic() - came
            until(lambda: seen(process) > 0, _PATIENCE_SECONDS, lambda: fetch(process.port, "/status")[1])
            passed = time.monotonic() - came
            slow = (slow + slowness()) / 2
            took.append(passed / slow)
            print(
                f"{mechanism}: {filled:.1f} s after the module the chain, {passed:.1f} s a look-up;"
                f" {took[-1]:.1f} s on a machine that is not {slow:.1f} times slower than a node"
            )
            nft(namespace, "flush ruleset")
    assert took[-1] <= WITHIN_SECONDS, took
