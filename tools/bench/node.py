# SPDX-License-Identifier: Apache-2.0
"""Start-up, memory, scrape and system call costs of the real daemon."""

import statistics
import subprocess
import time
from pathlib import Path

from figures import Figure

from kptrace.experiments.daemon_process import DaemonProcess, DaemonRequest, default_command
from kptrace.experiments.manifests import identity_text
from kptrace.experiments.node import EmbeddedNode
from kptrace.experiments.scrape import fetch
from kptrace.experiments.services import make_services
from kptrace.experiments.writer import RuleWriter
from kptrace.model.netfilter import DataPlane


def daemon(loops: Path, folder: Path) -> list[Figure]:
    """Start-up, memory, scrape time and syscall cost of the real daemon beside 2,000 services."""
    with EmbeddedNode() as node:
        services = make_services(2000, 2)
        RuleWriter(node.node, DataPlane.NFTABLES).install(services)
        identity = folder / "identity.json"
        identity.write_text(identity_text(services), encoding="utf-8")
        cache = folder / "cache"
        starts = []
        slower: dict[str, list[float]] = {name: [] for name in ("getppid", "sendmsg")}
        figures: list[Figure] = []
        for number in range(3):
            request = DaemonRequest(node.node.path, identity, folder / f"ready{number}")
            argv = [*default_command(request), "--cache-dir", str(cache)]
            before = {name: loop(loops, name) for name in slower}
            with DaemonProcess(argv, request.ready_file, folder / f"log{number}") as process:
                starts.append(process.startup_seconds)
                for name, differences in slower.items():
                    differences.append(loop(loops, name) - before[name])
                if number < 2:
                    continue
                time.sleep(60)  # the figure is the memory after 60 s
                times = []
                for _ in range(11):
                    begin = time.monotonic()
                    body = fetch(process.port)[1]
                    times.append(time.monotonic() - begin)
                size = len(body)
                figures = [
                    Figure("any syscall, above none traced", statistics.median(slower["getppid"]), "ns", 75),
                    Figure(
                        "sendmsg of a process that writes no rules",
                        statistics.median(slower["sendmsg"]),
                        "ns",
                        250,
                    ),
                    Figure("resident memory after 60 s", rss_mib(process.pid), "MiB", 128),
                    Figure("scrape at 2,000 services", statistics.median(times) * 1e3, "ms", 50),
                    Figure("size of a scrape", size / 1024, "KiB", 1024),
                ]
    return [
        Figure("start to ready, nothing cached", starts[0], "s", 2.0),
        Figure("start to ready, from cache", statistics.median(starts[1:]), "s", 0.5),
        *figures,
    ]


def loop(loops: Path, name: str) -> float:
    """Least ns per iteration of five runs."""
    runs = [
        subprocess.run([str(loops), name, "500000"], check=True, capture_output=True, text=True)
        for _ in range(5)
    ]
    return min(float(run.stdout.split()[0]) for run in runs)


def rss_mib(pid: int) -> float:
    """Resident memory of a process."""
    line = next(
        line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS")
    )
    return int(line.split()[1]) / 1024
