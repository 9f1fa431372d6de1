# SPDX-License-Identifier: Apache-2.0
"""What names cost at scale, on a real API server: the node's share, and the API server's for a cluster of 2,000 nodes.

`make bench ARGS=--identity` writes it to a section of its own in docs/overhead.md; `make acceptance PART=identity-scale`
follows changes for five minutes and fails beyond the budgets.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from figures import ROOT, Figure

from kptrace.experiments.netns import Namespace
from kptrace.experiments.scrape import Scrape
from tests.cluster import objects
from tests.cluster.accounts import apply, manifest, token
from tests.cluster.controlplane import ControlPlane
from tests.cluster.kptrace import Kptrace, kptrace_kubeconfig
from tests.cluster.programs import search_path, wait_for
from tests.cluster.scale import MANIFEST, LargeCluster, Reader

SERVICES, ENDPOINTS = 8000, 30
RATE = 100.0
#: How many watches of each kind are replayed, and for how many nodes: names on all of them, programming latency on the
#: share of the default.
WATCHERS, NODES, SHARE = 50, 2000, 0.05
TITLE = "## Identity at scale"
_NAMESPACE = "scale"
_TICKS = os.sysconf("SC_CLK_TCK")
_MIB = 1 << 20


class Replay:
    """A context manager: so many watches of Services and of EndpointSlices, whose answers are thrown away."""

    def __init__(self, plane: ControlPlane, folder: Path, services: int, slices: int) -> None:
        """They use the account of deploy/, with a token in `folder`."""
        apply(plane.client, manifest(MANIFEST))
        secret = folder / "replay.token"
        secret.write_text(token(plane.client, "kptrace", "kptrace"), encoding="ascii")
        authority = str(plane.authority.certificate)
        self._argv = [sys.executable, "-m", "tests.cluster.replay", str(plane.port), authority, str(secret)]
        self._argv.append(f"{services}:{slices}")

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            self._argv, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()

    def ask(self) -> dict[str, Any]:
        """Bytes so far, and whether all objects have come."""
        questions, answers = self._process.stdin, self._process.stdout
        if questions is None or answers is None:
            raise RuntimeError("the watches do not run")
        questions.write("\n")
        questions.flush()
        answer: dict[str, Any] = json.loads(answers.readline())
        return answer


@dataclass(frozen=True, slots=True)
class Load:
    """What the API server had done at a moment."""

    cpu: float
    requests: float
    read: int = 0

    @classmethod
    def now(cls, plane: ControlPlane, read: int = 0) -> "Load":
        """CPU seconds of its process, and requests as it counts them itself (a watch counts when it ends)."""
        if plane.server is None:
            raise RuntimeError("the API server does not run")
        stat = Path(f"/proc/{plane.server.pid}/stat").read_text().rpartition(")")[2].split()
        scrape = Scrape(plane.client.raw("GET", "/metrics")[1].decode())
        watches = sum(
            scrape.total("apiserver_request_total", resource=resource, verb="WATCH")
            for resource in ("services", "endpointslices")
        )
        return cls((int(stat[11]) + int(stat[12])) / _TICKS, watches, read)


def node_share(cluster: LargeCluster, folder: Path, seconds: float) -> list[Figure]:
    """CPU and memory of one process that knows everything, and loss."""
    with Reader(cluster.plane, folder / "account") as reader:
        listed = reader.wait_ready()
        if reader.report("digest").digest != cluster.digest():
            raise RuntimeError("what was listed is not what there is")
        size = f"{len(cluster.specs) * len(cluster.specs[0].endpoints):,} endpoints"
        figures = [
            Figure(f"CPU from start to all of {size} known", listed.ready_cpu, "s", 15),
            Figure(f"memory for the names of {size}, above none", listed.rss - listed.rss_before, "MiB"),
            Figure("memory of a process that knows only names", listed.rss, "MiB", 128),
            Figure("its peak", listed.peak, "MiB", 256),
        ]
        before, begin = reader.report(), time.monotonic()
        written = cluster.written
        rate = cluster.churn(RATE, seconds)
        after = reader.wait_for_changes(cluster.written - written)
        took = time.monotonic() - begin
        lost = cluster.written - written - after.changes
        if reader.report("digest").digest != cluster.digest():
            raise RuntimeError("what was followed is not what there is")
        share = (after.cpu - before.cpu) / took * 100
        return [
            *figures,
            Figure(f"changes a second, for {seconds:.0f} s", rate, "/s"),
            Figure("changes lost or told twice", abs(lost), "", 0),
            Figure("failures of the watches", after.errors, "", 0),
            Figure("CPU that follows them, of one core", share, "%", 5),
            Figure("memory after them", after.rss, "MiB", 128),
        ]


def daemon_share(cluster: LargeCluster, folder: Path) -> list[Figure]:
    """Memory of the whole daemon with all signals, which also follows what is to be programmed."""
    (folder / "daemon").mkdir()
    config = kptrace_kubeconfig(cluster.plane)
    options = ("--lookup-mechanism", "auto")
    with (
        Namespace("bench") as netns,
        Kptrace(netns, config, folder / "daemon", folder / "cache", options) as daemon,
    ):
        cluster.churn(RATE, 5.0)
        fields = (Path("/proc") / str(daemon.pid) / "status").read_text(encoding="ascii").splitlines()
        memory = {
            name: int(rest.split()[0]) / 1024
            for name, _, rest in (line.partition(":") for line in fields)
            if name in ("VmRSS", "VmHWM")
        }
    size = f"{len(cluster.specs) * len(cluster.specs[0].endpoints):,} endpoints"
    return [
        Figure(
            f"resident memory of the whole daemon with {size}, outside a pod", memory["VmRSS"], "MiB", 128
        ),
        Figure("its peak", memory["VmHWM"], "MiB", 256),
    ]


def server_share(cluster: LargeCluster, folder: Path, seconds: float) -> list[Figure]:
    """What watches cost the API server: Services and EndpointSlices apart, then for the whole cluster."""
    plane = cluster.plane
    idle = _churned(cluster, seconds, None)
    figures = []
    per: dict[str, tuple[float, float, float, float]] = {}
    for name, watches in (("Services", (WATCHERS, 0)), ("EndpointSlices", (0, WATCHERS))):
        before = Load.now(plane)
        with Replay(plane, folder, *watches) as replay:
            wait_for(lambda replay=replay: replay.ask()["complete"], f"{name} watched", seconds=300)
            begun = replay.ask()
            listed = Load.now(plane, begun["bytes"])
            changed = _churned(cluster, seconds, replay)
        count = sum(watches)
        # A watch is counted when it ends.
        ended = partial(_watches_since, plane, before)
        wait_for(lambda ended=ended, count=count: ended() >= count, "the watches' end")
        per[name] = (
            (listed.cpu - before.cpu) / count,
            listed.read / count,
            max(0.0, changed.cpu - idle.cpu) / count / seconds,
            changed.read / count / seconds,
        )
        start_cpu, start_bytes, cpu, data = per[name]
        figures += [
            Figure(f"watches of {name} replayed, by apiserver_request_total", ended(), ""),
            Figure("times that it asked to come again later (429)", begun["refused"], ""),
            Figure(f"API server's CPU to begin a watch of {name}", start_cpu * 1e3, "ms"),
            Figure(f"its answer to begin with, {name}", start_bytes / _MIB, "MiB"),
            Figure(
                f"API server's CPU for a watch of {name} at {RATE:.0f} changes/s", cpu * 100, "% of a core"
            ),
            Figure(f"what it sends for it, {name}", data / 1024, "KiB/s"),
        ]
    wide = {"Services": NODES, "EndpointSlices": round(NODES * SHARE)}
    total = [sum(per[name][column] * wide[name] for name in wide) for column in range(4)]
    what = f"{NODES:,} nodes, of which {wide['EndpointSlices']} watch EndpointSlices"
    return [
        *figures,
        Figure(f"API server's CPU for a roll-out on {what}", total[0], "s"),
        Figure("its answers to that", total[1] / _MIB / 1024, "GiB"),
        Figure(f"API server's CPU at {RATE:.0f} endpoint changes/s, {NODES:,} nodes", total[2], "cores"),
        Figure(f"what it sends at {RATE:.0f} endpoint changes/s, {NODES:,} nodes", total[3] / _MIB, "MiB/s"),
    ]


def _watches_since(plane: ControlPlane, before: Load) -> float:
    return Load.now(plane).requests - before.requests


def _churned(cluster: LargeCluster, seconds: float, replay: Replay | None) -> Load:
    """What the API server does for some seconds of changes."""
    before = Load.now(cluster.plane, replay.ask()["bytes"] if replay else 0)
    cluster.churn(RATE, seconds)
    if replay and replay.ask()["ended"]:
        raise RuntimeError("a watch ended before the measurement did")
    after = Load.now(cluster.plane, replay.ask()["bytes"] if replay else 0)
    return Load(after.cpu - before.cpu, after.requests - before.requests, after.read - before.read)


def measure(seconds: float, *, server: bool = True) -> list[Figure]:
    """Fill an API server and measure both shares."""
    with tempfile.TemporaryDirectory(prefix="kptrace-bench-") as name:
        folder = Path(name)
        with ControlPlane(folder) as plane:
            plane.client.create(objects.namespace(_NAMESPACE))
            begin = time.monotonic()
            cluster = LargeCluster(plane, SERVICES, ENDPOINTS, _NAMESPACE)
            print(f"{SERVICES:,} Services written in {time.monotonic() - begin:.0f} s", flush=True)
            figures = node_share(cluster, folder, seconds)
            print("\n".join(figure.row() for figure in figures), flush=True)
            figures += daemon_share(cluster, folder)
            return figures + (server_share(cluster, folder, min(seconds, 30.0)) if server else [])


def identity() -> tuple[str, list[Figure]]:
    """The text of the section in docs/overhead.md, and its figures."""
    subprocess.run([str(ROOT / "tests/cluster/tools/build.sh")], check=True)
    os.environ["PATH"] = search_path()
    figures = measure(30.0)
    table = "\n".join(figure.row() for figure in figures)
    text = (
        f"{TITLE}\n\nWritten by `make bench ARGS=--identity`: {SERVICES:,} Services of {ENDPOINTS} endpoints on a real API"
        f" server on the same machine, {os.cpu_count()} CPUs. Watches are kptrace's own requests; figures for {NODES:,}"
        f" nodes are those of {WATCHERS} replayed watches of each kind multiplied; {SHARE:.0%} of the nodes watch"
        " EndpointSlices, the default of `--programming-nodes`.\n\n"
        f"| what | measured | budget |\n| --- | --- | --- |\n{table}\n"
    )
    return text, figures


def over_budget(figures: Sequence[Figure], factor: float = 1.0) -> list[str]:
    """The figures beyond so many times their budgets."""
    return [each.what for each in figures if each.budget is not None and each.value > factor * each.budget]
