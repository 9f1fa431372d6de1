# SPDX-License-Identifier: Apache-2.0
"""How much slower a writer's commit is beside the daemon."""

import statistics
from pathlib import Path

from figures import Figure, build, settle

from kptrace.experiments.daemon_process import DaemonProcess, DaemonRequest, default_command
from kptrace.experiments.netns import Namespace

PAIRS = 20
OBJECTS = 10_000
#: Commits of one run, of which the quickest counts.
COMMITS = 5


def commits(folder: Path) -> list[Figure]:
    """How much slower a writer's commit is beside the daemon: interleaved pairs of 10,000-object transactions."""
    writer = build(folder, "commit")
    addresses = [f"10.{n >> 8}.{n & 255}.1" for n in range(OBJECTS)]
    legacy = "".join(f"-A BIG -d {address} -j ACCEPT\n" for address in addresses)
    ways = {"nftables": ["nft", str(OBJECTS), str(COMMITS)], "iptables-legacy": ["legacy", str(COMMITS)]}
    times: dict[tuple[str, bool], list[float]] = {
        (way, beside): [] for way in ways for beside in (False, True)
    }
    with Namespace("bench") as namespace:
        namespace.run(["iptables-legacy-restore"], stdin=f"*filter\n:BIG -\n{legacy}COMMIT\n")

        def measure(*, beside: bool) -> None:
            for way, arguments in ways.items():
                times[way, beside].append(float(namespace.run([str(writer), *arguments])))

        for number in range(PAIRS):
            # Whichever comes second finds the caches warmer.
            for beside in (False, True) if number % 2 else (True, False):
                if not beside:
                    measure(beside=False)
                    continue
                with daemon_on(namespace, folder, f"pair-{number}") as process:
                    settle(process.pid)
                    measure(beside=True)
    figures = []
    for way in ways:
        quick = {beside: statistics.quantiles(times[way, beside], n=4)[0] for beside in (False, True)}
        slower = (quick[True] / quick[False] - 1) * 100
        figures.append(Figure(f"commit of {OBJECTS:,} objects, {way}, no daemon", quick[False] / 1e6, "ms"))
        figures.append(Figure(f"commit of {OBJECTS:,} objects, {way}, slower by", slower, "%", 5))
    return figures


def daemon_on(namespace: Namespace, folder: Path, name: str) -> DaemonProcess:
    """A daemon with the defaults on a namespace, without services."""
    request = DaemonRequest(namespace.path, folder / "none.json", folder / name)
    request.identity_file.write_text('{"apiVersion": "v1", "kind": "List", "items": []}')
    argv = [*default_command(request), "--cache-dir", str(folder / "cache")]
    return DaemonProcess(argv, request.ready_file, folder / "log")
