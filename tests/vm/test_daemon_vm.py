# SPDX-License-Identifier: Apache-2.0
"""The installed daemon on each kernel: it measures what is promised, and says politely what it cannot."""

import subprocess
import time
from collections.abc import Callable, Mapping
from typing import NoReturn

import pytest

from kptrace.experiments.daemon_process import DaemonProcess
from kptrace.experiments.netns import Namespace
from kptrace.experiments.scrape import Scrape, fetch, parse
from tests.native.lookup_bench import nft, nft_counter
from tests.vm.daemons import PORT, READY_SECONDS, send

PACKETS = 23
REWRITES = 5
CHAIN = f"table ip t {{ chain c {{ type filter hook output priority -100; udp dport {PORT} counter; }}; }}"
_UNSUPPORTED = 4
#: Of emulated time, for what a daemon does within seconds.
_PATIENCE_SECONDS = 60.0


@pytest.mark.promised("lookup", "bracket")
def test_brackets_count_every_packet(daemon: Callable[..., DaemonProcess], namespace: Namespace) -> None:
    """23 packets, 23 in nft's counter, 23 look-ups in /metrics."""
    nft(namespace, CHAIN)
    process = daemon()
    send(namespace, PACKETS)
    assert nft_counter(namespace, "c") == PACKETS
    found = process.scrape().distribution(
        "kptrace_lookup_duration_seconds", table="t", chain="c", mechanism="bracket"
    )
    assert found.count == PACKETS


@pytest.mark.parametrize(
    "mechanism",
    [pytest.param(name, marks=pytest.mark.promised("lookup", name)) for name in ("fentry", "kprobe")],
)
def test_functions_count_what_walks_a_table_that_came_later(
    daemon: Callable[..., DaemonProcess],
    namespace: Namespace,
    mechanism: str,
    lacking: Callable[[str], NoReturn],
) -> None:
    """The daemon runs when iptables brings its module, as kube-proxy does: of 23 packets then sent 23 are counted."""
    process = daemon("--lookup-mechanism", mechanism)
    modules = subprocess.run(["modprobe", "iptable_filter"], capture_output=True, text=True, check=False)
    if modules.returncode:
        lacking(modules.stderr)
    namespace.run(["iptables-legacy", "-A", "OUTPUT", "-p", "udp", "-j", "ACCEPT"])
    end = time.monotonic() + _PATIENCE_SECONDS
    while "ipt_do_table: attached" not in (status := fetch(process.port, "/status")[1]):
        assert time.monotonic() < end, status
        time.sleep(0.2)
    send(namespace, PACKETS)
    name, labels = (
        "kptrace_lookup_duration_seconds",
        {"mechanism": mechanism, "chain": "OUTPUT", "netns": "host"},
    )
    found = process.scrape().distribution(name, dataplane="iptables-legacy", table="filter", **labels)
    assert found.count == PACKETS


@pytest.mark.promised_something(True)
def test_each_promised_signal_is_measured(
    daemon: Callable[..., DaemonProcess], mechanisms: list[tuple[str, str]]
) -> None:
    """By the first mechanism that is promised for it, where there is anything to measure; no other one runs."""
    process = daemon()

    def expected(now: Scrape) -> dict[str, str]:
        idle = {row["signal"] for row in _states(now) if row["reason"] in {"disabled", "absent"}}
        return {signal: way for signal, way in reversed(mechanisms) if signal not in idle}

    # Some are attached to once the daemon is ready, in a thread of their own.
    scrape = process.scrape_until(lambda now: _running(now) == expected(now), seconds=READY_SECONDS)
    assert _running(scrape) == expected(scrape), scrape.lines("kptrace_signal_state")
    assert {"lookup", "sync"} <= _running(scrape).keys()


def _states(scrape: Scrape) -> list[Mapping[str, str]]:
    """The labels of every mechanism's present state."""
    return [
        sample.labels for sample in parse("\n".join(scrape.lines("kptrace_signal_state"))) if sample.value
    ]


def _running(scrape: Scrape) -> dict[str, str]:
    """Signal to mechanism of those that run, but for what kptrace says of itself."""
    rows = [row for row in _states(scrape) if row["state"] in {"active", "degraded"}]
    return {row["signal"]: row["mechanism"] for row in rows if row["signal"] != "identity"}


@pytest.mark.promised("rewrite", "tracepoint")
def test_rewrites_are_counted(daemon: Callable[..., DaemonProcess], namespace: Namespace) -> None:
    """5 transactions of nft are 5 committed rewrites in /metrics."""
    process = daemon()
    for number in range(REWRITES):
        nft(namespace, f"table ip r{number} {{ chain c {{ udp dport {PORT} drop; }}; }}")
    name = "kptrace_rewrite_duration_seconds"
    scrape = process.scrape_until(
        lambda now: now.distribution(name, outcome="committed").count >= REWRITES, seconds=_PATIENCE_SECONDS
    )
    assert scrape.distribution(name, outcome="committed").count == REWRITES


@pytest.mark.unpromised("lookup", "bracket")
@pytest.mark.promised_something(True)
def test_the_daemon_runs_without_brackets(daemon: Callable[..., DaemonProcess], namespace: Namespace) -> None:
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
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=READY_SECONDS)
    said = (done.stdout + done.stderr).strip().splitlines()
    assert done.returncode == _UNSUPPORTED, said
    lines = [line for line in said if not line.startswith("{")]
    assert len(lines) == 1, said
    return lines[0]
