# SPDX-License-Identifier: Apache-2.0
"""A process that knows names as a pod's daemon does, and nothing else: what identity alone costs.

Usage: reader.py HOST PORT ACCOUNT_FOLDER NODE. Each line on stdin is answered by one of JSON on stdout, `digest` with a
checksum of all names; at the end of stdin it ends.
"""

import hashlib
import json
import os
import select
import sys
import time
from pathlib import Path

from kptrace.identity.client import KubernetesApi
from kptrace.identity.differences import Difference
from kptrace.identity.resources import Level, resources
from kptrace.identity.source import ERRORS, Identity
from kptrace.identity.watchfeed import WatchFeed
from kptrace.model.identity import Snapshot

#: As often as the daemon takes what arrived.
_POLL_SECONDS = 0.5
_READ_BYTES = 65536


def digest(snapshot: Snapshot) -> str:
    """All addresses of Services and all their endpoints, in an order of their own, as a checksum."""
    lines = [
        f"{at.ip} {at.port} {port.namespace}/{port.name}:{port.port}"
        for at, port in snapshot.services.items()
    ]
    for port, endpoints in snapshot.endpoints.items():
        lines.extend(
            f"{port.namespace}/{port.name}:{port.port} {end.ip}:{end.port} {end.node}" for end in endpoints
        )
    return checksum(lines)


def checksum(lines: list[str]) -> str:
    """Of lines in any order."""
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def main() -> None:
    """Watch Services and EndpointSlices until stdin ends."""
    host, port, account, node = sys.argv[1:]
    environ = {"KUBERNETES_SERVICE_HOST": host, "KUBERNETES_SERVICE_PORT": port}
    api = KubernetesApi(environ=environ, account=Path(account))
    before = rss("VmRSS")
    wanted = resources(Level.SERVICES, node=node, endpoint_slices=True)
    identity = Identity(WatchFeed(api, wanted, start_delay=0.0), node=node)
    changes = 0

    def count(_difference: Difference) -> None:
        nonlocal changes
        changes += 1

    identity.follow(count)
    begin = time.process_time()
    identity.start()
    ready = 0.0
    while True:
        readable, _, _ = select.select([sys.stdin], [], [], _POLL_SECONDS if ready else _POLL_SECONDS / 10)
        identity.poll()
        if identity.ready and not ready:
            ready = time.process_time() - begin
        if not readable:
            continue
        asked = os.read(sys.stdin.fileno(), _READ_BYTES)
        if not asked:
            break
        cpu = time.process_time()
        errors = next(family for family in identity.families() if family.spec is ERRORS)
        answer = {
            "ready": identity.ready,
            "ready_cpu": ready,
            "cpu": cpu,
            "rss_before": before,
            "rss": rss("VmRSS"),
            "peak": rss("VmHWM"),
            "services": len(identity.snapshot().services),
            "changes": changes,
            "errors": sum(sample.value for sample in errors.samples),
            "digest": digest(identity.snapshot()) if b"digest" in asked else "",
        }
        print(json.dumps(answer), flush=True)
    identity.close()


def rss(field: str) -> float:
    """Memory of this process, MiB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


if __name__ == "__main__":
    main()
