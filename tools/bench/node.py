# SPDX-License-Identifier: Apache-2.0
"""Start-up, memory, scrape and system call costs of the real daemon."""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from figures import Figure

from kptrace.experiments.daemon_process import DaemonProcess, DaemonRequest, default_command
from kptrace.experiments.manifests import identity_text
from kptrace.experiments.netns import Namespace
from kptrace.experiments.node import EmbeddedNode
from kptrace.experiments.scrape import fetch
from kptrace.experiments.services import make_services
from kptrace.experiments.writer import RuleWriter
from kptrace.model.netfilter import DataPlane

#: A writer that dumps the chains of nf_tables once (NFT_MSG_GETCHAIN, NLM_F_DUMP) and then stays.
_LISTS = """
import socket, struct, sys
with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12) as channel:
    channel.send(struct.pack("=IHHIIBBH", 20, 10 << 8 | 4, 0x301, 1, 0, 2, 0, 0))
    sys.stdin.read()
"""


def daemon(loops: Path, folder: Path) -> list[Figure]:
    """Start-up, memory, scrape time and syscall cost of the real daemon beside 2,000 services."""
    with EmbeddedNode() as node:
        services = make_services(2000, 2)
        RuleWriter(node.node, DataPlane.NFTABLES).install(services)
        identity = folder / "identity.json"
        identity.write_text(identity_text(services), encoding="utf-8")
        cache = folder / "cache"
        starts = []
        slower: dict[str, list[float]] = {name: [] for name in ("getppid", "sendmsg", "recvfrom")}
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
                with kube_proxy_that_lists(node.node, folder):
                    while _receives(process.port) != "attached":
                        time.sleep(0.1)
                    receive = loop(loops, "recvfrom") - before["recvfrom"]
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
                    Figure(
                        "recvfrom while no writer lists by netlink itself",
                        statistics.median(slower["recvfrom"]),
                        "ns",
                        75,
                    ),
                    Figure("recvfrom of others while one does", receive, "ns", 250),
                    Figure("resident memory after 60 s", rss_mib(process.pid), "MiB", 128),
                    Figure("scrape at 2,000 services", statistics.median(times) * 1e3, "ms", 50),
                    Figure("size of a scrape", size / 1024, "KiB", 1024),
                ]
    return [
        Figure("start to ready, nothing cached", starts[0], "s", 2.0),
        Figure("start to ready, from cache", statistics.median(starts[1:]), "s", 0.5),
        *figures,
    ]


@contextmanager
def kube_proxy_that_lists(namespace: Namespace, folder: Path) -> Iterator[None]:
    """A process by that name, which lists what is installed by netlink, as kube-proxy does from 1.37 on."""
    program = folder / "kube-proxy"
    shutil.copy2(os.path.realpath(sys.executable), program)
    with namespace.enter():
        process = subprocess.Popen(
            [str(program), "-c", _LISTS],
            stdin=subprocess.PIPE,
            env={**os.environ, "PYTHONHOME": sys.base_prefix},
        )
    try:
        yield
    finally:
        process.communicate()


def _receives(port: int) -> str:
    """Whether the daemon traces receives, as its /status says."""
    return str(json.loads(fetch(port, "/status?format=json")[1])["netlink_requests"]["receives"])


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
