# SPDX-License-Identifier: Apache-2.0
import os
from pathlib import Path

import pytest

from kptrace.identity.objects import decode
from kptrace.identity.records import Kind
from kptrace.identity.resolve import pod_of_process, pod_uid, pods_by_namespace
from kptrace.identity.store import Store
from kptrace.model.identity import Snapshot

UID = "0b5a1c3e-1111-4222-8333-0123456789ab"
STATIC = "3f2a1b0c9d8e7f60514233241506f7e8"
HOST = "9c9c9c9c-0000-4000-8000-000000000001"


@pytest.mark.parametrize(
    ("path", "uid"),
    [
        (f"/kubepods/burstable/pod{UID}/0123456789abcdef", UID),
        (
            f"/kubepods.slice/kubepods-burstable-pod{UID.replace('-', '_')}.slice/cri-containerd-01.scope",
            UID,
        ),
        (f"/kubepods.slice/kubepods-pod{STATIC}.slice/crio-01.scope", STATIC),
        (f"/kubepods/besteffort/pod{STATIC}", STATIC),
        # kind: the node is a container itself, whose pods are within it.
        (f"/kubepods/pod{HOST}/0123/kubelet/kubepods/pod{UID}/4567", UID),
        ("/system.slice/kubelet.service", ""),
        ("/user.slice/podman-1234.scope", ""),
        ("/", ""),
    ],
)
def test_a_cgroup_names_its_pod(path: str, uid: str) -> None:
    """Both cgroup drivers, static pods, and nodes that are containers; nothing else is taken for a pod."""
    assert pod_uid(path) == uid


@pytest.fixture
def snapshot() -> Snapshot:
    """A pod, a static pod (of which the API server has an image with a uid of its own), and one in the host's network."""
    store = Store()
    static = {"kubernetes.io/config.mirror": STATIC}
    for name, uid, annotations, host in (
        ("web", UID, {}, False),
        ("static", "1a1a1a1a-0000-4000-8000-000000000001", static, False),
        ("proxy", HOST, {}, True),
    ):
        metadata = {"name": name, "namespace": "ns", "uid": uid, "annotations": annotations}
        store.apply(decode(Kind.PODS, {"metadata": metadata, "spec": {"hostNetwork": host}}))
    return store.snapshot()


def process(proc: Path, pid: int, cgroup: str, namespace: Path) -> None:
    """A process in a made-up procfs."""
    (proc / str(pid) / "ns").mkdir(parents=True)
    (proc / str(pid) / "cgroup").write_text(cgroup, encoding="utf-8")
    (proc / str(pid) / "ns/net").symlink_to(namespace)


def test_processes_and_namespaces_lead_to_pods(snapshot: Snapshot, tmp_path: Path) -> None:
    """By either version of cgroups; a pod in the host's network has no namespace, and the host's is nobody's."""
    spaces = [tmp_path / name for name in ("web", "static", "host")]
    for space in spaces:
        space.touch()
    proc = tmp_path / "proc"
    (proc / "self").mkdir(parents=True)
    process(proc, 10, f"0::/kubepods/pod{UID}/a\n", spaces[0])
    process(proc, 11, f"12:cpu:/system.slice\n3:memory:/kubepods/pod{STATIC}/b\n", spaces[1])
    process(proc, 12, f"0::/kubepods/pod{HOST}/c\n", spaces[2])
    process(proc, 13, "0::/system.slice/kubelet.service\n", spaces[2])
    names = [
        (pod.name if pod else None) for pod in (pod_of_process(snapshot, pid, proc) for pid in range(10, 15))
    ]
    assert names == ["web", "static", "proxy", None, None]
    (proc / "10/ns/net").unlink()
    process(proc, 14, f"0::/kubepods/pod{UID}/d\n", spaces[0])
    found = {inode: pod.name for inode, pod in pods_by_namespace(snapshot, proc).items()}
    assert found == {os.stat(spaces[0]).st_ino: "web", os.stat(spaces[1]).st_ino: "static"}  # noqa: PTH116


def test_a_pod_that_has_gone_is_forgotten(snapshot: Snapshot) -> None:
    """Only pods of the snapshot are found."""
    assert set(snapshot.pods_by_uid) == {UID, STATIC, HOST}
    assert pod_of_process(Snapshot(), os.getpid()) is None
