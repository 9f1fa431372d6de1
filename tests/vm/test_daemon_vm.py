# SPDX-License-Identifier: Apache-2.0
"""The installed daemon on each kernel: it measures what is promised, and says politely what it cannot."""

import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kptrace.experiments.daemon_process import DaemonProcess, DaemonRequest, default_command
from kptrace.experiments.netns import Namespace
from tests.native import traffic
from tests.native.lookup_bench import nft, nft_counter

PACKETS = 23
REWRITES = 5
PORT = 5353
CHAIN = f"table ip t {{ chain c {{ type filter hook output priority -100; udp dport {PORT} counter; }}; }}"
NO_SERVICES = '{"apiVersion": "v1", "kind": "List", "items": []}'
_UNSUPPORTED = 4
# To compile takes a second on a node, and up to a minute here while another machine uses the other core.
_READY_SECONDS = 200.0


@pytest.fixture
def daemon(namespace: Namespace, tmp_path: Path) -> Iterator[Callable[[], DaemonProcess]]:
    """Start the image's daemon on the test's namespace; it ends with the test, and never with a traceback."""
    started: list[DaemonProcess] = []
    log = tmp_path / "log"

    def start() -> DaemonProcess:
        identity = tmp_path / "identity.json"
        identity.write_text(NO_SERVICES)
        request = DaemonRequest(namespace.path, identity, tmp_path / "ready")
        options = default_command(request)[3:]
        argv = ["kptrace", *options, "--sample", "all"]
        started.append(DaemonProcess(argv, request.ready_file, log, ready_seconds=_READY_SECONDS))
        return started[-1].__enter__()

    yield start
    for each in started:
        each.stop()
    text = log.read_text()
    print(text)
    assert "Traceback" not in text


@pytest.mark.promised("lookup", "bracket")
def test_brackets_count_every_packet(daemon: Callable[[], DaemonProcess], namespace: Namespace) -> None:
    """23 packets, 23 in nft's counter, 23 look-ups in /metrics."""
    nft(namespace, CHAIN)
    process = daemon()

    def send() -> None:
        with traffic.udp_sink(socket.AF_INET, PORT):
            traffic.udp_one_flow(socket.AF_INET, PORT, PACKETS)

    namespace.call(send)
    assert nft_counter(namespace, "c") == PACKETS
    found = process.scrape().distribution(
        "kptrace_lookup_duration_seconds", table="t", chain="c", mechanism="bracket"
    )
    assert found.count == PACKETS


@pytest.mark.promised("rewrite", "tracepoint")
def test_rewrites_are_counted(daemon: Callable[[], DaemonProcess], namespace: Namespace) -> None:
    """5 transactions of nft are 5 committed rewrites in /metrics."""
    process = daemon()
    for number in range(REWRITES):
        nft(namespace, f"table ip r{number} {{ chain c {{ udp dport {PORT} drop; }}; }}")
    name = "kptrace_rewrite_duration_seconds"
    scrape = process.scrape_until(
        lambda now: now.distribution(name, outcome="committed").count >= REWRITES, seconds=60
    )
    assert scrape.distribution(name, outcome="committed").count == REWRITES


@pytest.mark.unpromised("lookup", "bracket")
@pytest.mark.promised_something(True)
def test_the_daemon_runs_without_brackets(daemon: Callable[[], DaemonProcess], namespace: Namespace) -> None:
    """On a kernel that is too old for brackets the daemon serves the rest and /metrics says what is missing."""
    nft(namespace, CHAIN)
    scrape = daemon().scrape()
    assert (
        scrape.total("kptrace_signal_state", signal="lookup", mechanism="bracket", state="unavailable") == 1
    )


@pytest.mark.promised_something(False)
def test_a_kernel_that_can_do_nothing_is_refused() -> None:
    """Where no mechanism is promised the daemon ends with code 4 and one line that says so."""
    assert _refusal().startswith("kptrace: nothing can be measured on this kernel: ")


@pytest.mark.unpromised("lookup", "bracket")
def test_asking_for_brackets_is_refused_in_one_line() -> None:
    """`--lookup-mechanism=bracket` ends with code 4 and one line that names the missing feature."""
    line = _refusal("--lookup-mechanism", "bracket")
    assert line.startswith("kptrace: look-ups cannot be measured by bracket: ")
    assert "netfilter_link" in line


def _refusal(*options: str) -> str:
    """The one line for people that the daemon ends with when it refuses to run; its log is left out."""
    argv = ["kptrace", "run", "--identity", "none", "--listen", "127.0.0.1:0", *options]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=_READY_SECONDS)
    said = (done.stdout + done.stderr).strip().splitlines()
    assert done.returncode == _UNSUPPORTED, said
    lines = [line for line in said if not line.startswith("{")]
    assert len(lines) == 1, said
    return lines[0]
