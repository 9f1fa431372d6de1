# SPDX-License-Identifier: Apache-2.0
"""The pod behind a cgroup, a process, or a network namespace of this node."""

import re
from collections.abc import Mapping
from pathlib import Path

from kptrace.model.identity import Pod, Snapshot

#: `/kubepods/burstable/pod<uid>/<container>` by the cgroupfs driver, `…-pod<uid, with _ for ->.slice/…` by systemd's; a
#: static pod's uid is a hash without dashes.
_POD = re.compile(
    r"(?:^|[/-])pod([0-9a-f]{8}(?:[-_][0-9a-f]{4}){3}[-_][0-9a-f]{12}|[0-9a-f]{32})(?:\.slice)?(?=/|$)"
)


def pod_uid(cgroup: str) -> str:
    """The uid in a cgroup's path, of the innermost pod (kind and minikube run pods within a container); else empty."""
    found = _POD.findall(cgroup)
    return found[-1].replace("_", "-") if found else ""


def pod_of_cgroup(snapshot: Snapshot, cgroup: str) -> Pod | None:
    """The pod that a cgroup belongs to; None for the host's own, and for a pod that is not known."""
    return snapshot.pods_by_uid.get(pod_uid(cgroup))


def pod_of_process(snapshot: Snapshot, pid: int, proc: Path = Path("/proc")) -> Pod | None:
    """The pod that a process runs in; None as for its cgroup, and for a process that has ended."""
    try:
        lines = (proc / str(pid) / "cgroup").read_text(encoding="utf-8", errors="replace").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # One line for each hierarchy: `0::/path` for version 2; they agree about the pod.
    found = (pod_of_cgroup(snapshot, line.split(":", 2)[-1]) for line in lines)
    return next((pod for pod in found if pod is not None), None)


def pods_by_namespace(snapshot: Snapshot, proc: Path = Path("/proc")) -> Mapping[int, Pod]:
    """The pods that have a network namespace of their own, by its inode number.

    It looks at every process of the node, so it is nothing for every packet.
    """
    found: dict[int, Pod] = {}
    for entry in proc.iterdir():
        if not entry.name.isdigit():
            continue
        pod = pod_of_process(snapshot, int(entry.name), proc)
        if pod is None or pod.host_network:
            continue
        try:
            found[(entry / "ns/net").stat().st_ino] = pod
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended meanwhile
    return found
