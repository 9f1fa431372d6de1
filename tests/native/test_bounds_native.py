# SPDX-License-Identifier: Apache-2.0
"""What others do to a node must not make kptrace grow: floods of rewrites, and of names that it never saw."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kptrace.experiments.daemon_process import DaemonProcess, DaemonRequest, default_command
from kptrace.experiments.netns import Namespace
from kptrace.experiments.scrape import Scrape, fetch

FOREIGN = 1999
#: Series that names of others may take: the bound of the metric dictionary, in each of several metrics.
NAMES = 32


@pytest.fixture
def process(namespace: Namespace, tmp_path: Path) -> Iterator[DaemonProcess]:
    """A daemon on the test's namespace."""
    identity = tmp_path / "identity.json"
    identity.write_text('{"apiVersion": "v1", "kind": "List", "items": []}')
    request = DaemonRequest(namespace.path, identity, tmp_path / "ready")
    argv = [*default_command(request), "--cache-dir", str(tmp_path / "cache")]
    with DaemonProcess(argv, request.ready_file, tmp_path / "log") as made:
        yield made


def reasons(process: DaemonProcess) -> set[str]:
    """The reasons of all mechanisms' states; what starts late has `starting` until it runs."""
    rows = json.loads(fetch(process.port, "/status?format=json")[1])["signals"]
    return {row["reason"] for row in rows}


def resident(process: DaemonProcess) -> int:
    """Bytes of memory."""
    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
    return pages * 4096


def committed(scrape: Scrape) -> float:
    """Committed rewrites: those that were timed, and those that only the generation tells of."""
    timed = scrape.total("kptrace_rewrite_duration_seconds_count", outcome="committed")
    return timed + scrape.total("kptrace_events_lost_total", reason="untraced_commit")


def until(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait for a condition; whether it came true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def flood(namespace: Namespace, first: int, count: int) -> None:
    """Make tables with a base chain, all of other names, and delete them: three commits each."""
    lines = []
    for n in range(first, first + count):
        table = f"ip foreign-table-of-a-rather-long-name-{n}"
        lines.append(f"add table {table}")
        lines.append(f"add chain {table} chain-{n} {{ type filter hook output priority 5; policy accept; }}")
        lines.append(f"delete table {table}")
    namespace.run(["nft", "-i"], stdin="\n".join(lines) + "\n")


def test_foreign_names_do_not_make_it_grow(process: DaemonProcess, namespace: Namespace) -> None:
    """Thousands of tables and chains of others leave series and memory within their bounds, and every commit counted."""
    assert until(lambda: "starting" not in reasons(process), 60), reasons(process)
    flood(namespace, 0, 97)
    assert until(lambda: committed(process.scrape()) >= 3 * 97, 30)
    before = resident(process)
    flood(namespace, 97, FOREIGN - 97)
    assert until(lambda: committed(process.scrape()) >= 3 * FOREIGN, 60)
    scrape = process.scrape()
    assert committed(scrape) == 3 * FOREIGN
    assert scrape.total("kptrace_series") < 1500
    for metric in ("kptrace_rewrite_duration_seconds_count", "kptrace_lookup_duration_seconds_count"):
        assert len(scrape.lines(metric)) <= NAMES + 2, metric
    grown = resident(process) - before
    assert grown < 8 << 20, f"{grown / 2**20:.1f} MiB"
