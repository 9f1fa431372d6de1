# SPDX-License-Identifier: Apache-2.0
"""A real Prometheus scrapes a real daemon."""

import json
import shutil
import socket
import subprocess
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kptrace.experiments.daemon_process import DaemonProcess, DaemonRequest, default_command
from kptrace.experiments.netns import Namespace, stop
from kptrace.experiments.scrape import fetch
from tests.native import traffic
from tests.native.lookup_bench import nft, nft_counter

PORT = 5353
CHAIN = f"table ip t {{ chain c {{ type filter hook output priority -100; udp dport {PORT} counter; }}; }}"


@pytest.fixture
def daemon(namespace: Namespace, tmp_path: Path) -> Iterator[DaemonProcess]:
    """A daemon on a namespace with one chain, and 101 packets sent through it."""
    nft(namespace, CHAIN)
    identity = tmp_path / "identity.json"
    identity.write_text('{"apiVersion": "v1", "kind": "List", "items": []}')
    request = DaemonRequest(namespace.path, identity, tmp_path / "ready")
    argv = [*default_command(request), "--cache-dir", str(tmp_path / "cache"), "--sample", "all"]
    with DaemonProcess(argv, request.ready_file, tmp_path / "log") as process:

        def send() -> None:
            with traffic.udp_sink(socket.AF_INET, PORT):
                traffic.udp_one_flow(socket.AF_INET, PORT, 101)

        namespace.call(send)
        assert nft_counter(namespace, "c") == 101
        yield process


@pytest.fixture
def prometheus(daemon: DaemonProcess, tmp_path: Path) -> Iterator[str]:
    """A Prometheus with two jobs that scrape the daemon every second; its URL."""
    if shutil.which("prometheus") is None:
        pytest.skip("prometheus is not installed")
    jobs = "".join(
        f"  - job_name: {name}\n    static_configs: [{{targets: ['127.0.0.1:{daemon.port}']}}]\n"
        for name in ("one", "two")
    )
    config = tmp_path / "prometheus.yml"
    config.write_text(f"global: {{scrape_interval: 1s, scrape_timeout: 1s}}\nscrape_configs:\n{jobs}")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [
            "prometheus",
            f"--config.file={config}",
            f"--storage.tsdb.path={tmp_path / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        stop(process)


def query(url: str, expression: str) -> list[dict[str, Any]]:
    """An instant query; nothing while Prometheus is not up yet."""
    try:
        answer = fetch(
            int(url.rpartition(":")[2]), f"/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
        )
    except OSError:
        return []
    result: list[dict[str, Any]] = json.loads(answer[1])["data"]["result"] if answer[0] == 200 else []
    return result


def test_two_jobs_see_the_same(prometheus: str) -> None:
    """Two scrapers of one daemon both see all 101 packets, under labels that collide with none of Prometheus' own."""
    expression = 'kptrace_lookup_duration_seconds_count{table="t",chain="c"}'
    deadline = time.monotonic() + 30
    while len(found := query(prometheus, expression)) < 2 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert {(row["metric"]["job"], row["value"][1]) for row in found} == {("one", "101"), ("two", "101")}
    every = query(prometheus, '{__name__=~"kptrace_.+"}')
    assert len(every) > 20
    assert not [name for row in every for name in row["metric"] if name.startswith("exported_")]
    assert not query(prometheus, 'up{job=~"one|two"} == 0')


def test_promtool_finds_no_fault(daemon: DaemonProcess) -> None:
    """`promtool check metrics` accepts a live scrape without a word."""
    run = subprocess.run(
        ["promtool", "check", "metrics"],
        input=fetch(daemon.port)[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, run.stdout + run.stderr) == (0, "")
