# SPDX-License-Identifier: Apache-2.0
"""The real daemon: a writer's wait for the xtables lock is a phase of its run, and what this kernel refuses is said."""

import fcntl
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kptrace.experiments.daemon_process import DaemonProcess, DaemonRequest, default_command
from kptrace.experiments.netns import Namespace
from kptrace.experiments.scrape import fetch
from kptrace.kernel.features import probe
from kptrace.kernel.host import Host

pytestmark = pytest.mark.native
RULES = "*filter\n-A OUTPUT -j ACCEPT\nCOMMIT\n"
PHASES = "kptrace_sync_phase_duration_seconds"
HELD_SECONDS = 0.4
PATIENCE_SECONDS = 30.0


@pytest.fixture
def daemon(namespace: Namespace, tmp_path: Path) -> Iterator[DaemonProcess]:
    """A daemon on the test's namespace."""
    identity = tmp_path / "identity.json"
    identity.write_text('{"apiVersion": "v1", "kind": "List", "items": []}')
    request = DaemonRequest(namespace.path, identity, tmp_path / "ready")
    with DaemonProcess(default_command(request), request.ready_file, tmp_path / "log") as process:
        yield process


def until_blocked(lock: Path) -> None:
    """Wait until somebody waits for the lock, as /proc/locks has it."""
    mark, ends = f":{lock.stat().st_ino} ", time.monotonic() + PATIENCE_SECONDS
    while not any(
        "-> FLOCK" in line and mark in line for line in Path("/proc/locks").read_text().splitlines()
    ):
        assert time.monotonic() < ends
        time.sleep(0.01)


def test_the_wait_for_the_lock_is_a_phase_of_the_run(
    daemon: DaemonProcess, namespace: Namespace, tmp_path: Path
) -> None:
    """A writer that finds the lock taken spends that time in lock_wait; all phases still add up to its run."""
    lock, writer = tmp_path / "xtables.lock", tmp_path / "kube-proxy"
    shutil.copy("/bin/dash", writer)
    argv = [
        "env",
        f"XTABLES_LOCKFILE={lock}",
        str(writer),
        "-c",
        "iptables-legacy-restore -w 30 --noflush; :",
    ]
    descriptor = os.open(lock, os.O_CREAT | os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        process = namespace.call(lambda: subprocess.Popen(argv, stdin=subprocess.PIPE, text=True))
        assert process.stdin is not None
        process.stdin.write(RULES)
        process.stdin.close()
        until_blocked(lock)
        begin = time.monotonic()
        time.sleep(HELD_SECONDS)  # not for a condition: it is what is measured
        held = time.monotonic() - begin
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        assert process.wait(PATIENCE_SECONDS) == 0
        lasted = time.monotonic() - begin
    finally:
        os.close(descriptor)
    scrape = daemon.scrape_until(
        lambda now: now.distribution(PHASES, phase="lock_wait").count > 0, seconds=PATIENCE_SECONDS
    )
    waited = scrape.total(f"{PHASES}_sum", phase="lock_wait", writer="kube-proxy")
    whole = scrape.total("kptrace_sync_duration_seconds_sum", writer="kube-proxy")
    assert held <= waited <= whole
    assert scrape.total(f"{PHASES}_sum", writer="kube-proxy") == pytest.approx(whole, rel=1e-6)
    assert scrape.total(f"{PHASES}_sum", phase="write", writer="kube-proxy") < lasted
    assert scrape.distribution(PHASES, phase="lock_wait", writer="kube-proxy").count == 1


def test_phases_that_this_kernel_refuses_degrade_nothing_else(daemon: DaemonProcess) -> None:
    """Where neither fentry nor kprobes work, both rows say what the probe saw, and every other signal is active."""
    features = probe(Host())
    if features["fentry"].supported or features["kprobe"].supported:
        pytest.skip("this kernel has fentry or kprobes: tests/vm shows what comes of it")

    def rows() -> dict[tuple[str, str], dict[str, str]]:
        document = json.loads(fetch(daemon.port, "/status?format=json")[1])
        return {(row["signal"], row["mechanism"]): row for row in document["signals"]}

    keys, ends = (
        [("rewrite_phases", "fentry"), ("rewrite_phases", "kprobe")],
        time.monotonic() + PATIENCE_SECONDS,
    )
    while any(rows()[key]["reason"] == "starting" for key in keys):
        assert time.monotonic() < ends
        time.sleep(0.05)
    found = rows()
    for key in keys:
        assert found[key]["state"] == "unavailable"
        assert found[key]["reason"] == features[key[1]].reason
        assert features[key[1]].detail in found[key]["detail"]
    for signal in ("lookup", "sync", "rewrite", "xtables_lock"):
        assert [row["state"] for row in found.values() if row["signal"] == signal].count("active") == 1
    assert daemon.scrape().total("kptrace_signal_state", signal="rewrite_phases", state="unavailable") == 2
