# SPDX-License-Identifier: Apache-2.0
"""Identity at a tenth of the scale that `make acceptance PART=identity-scale` shows."""

from pathlib import Path

from tests.cluster.controlplane import ControlPlane
from tests.cluster.scale import LargeCluster, Reader

_SERVICES, _ENDPOINTS = 800, 30


def test_names_are_listed_and_followed_without_loss(
    plane: ControlPlane, kube_namespace: str, tmp_path: Path
) -> None:
    """Of 24,000 endpoints and 100 changes a second every one is known, at a small part of one core."""
    cluster = LargeCluster(plane, _SERVICES, _ENDPOINTS, kube_namespace)
    with Reader(plane, tmp_path / "account") as reader:
        listed = reader.wait_ready()
        assert reader.report("digest").digest == cluster.digest()
        assert listed.ready_cpu < 15.0 * _SERVICES / 8000 * 3
        before = reader.report()
        rate = cluster.churn(100.0, 5.0)
        after = reader.wait_for_changes(cluster.written)
        assert (after.changes, after.errors) == (cluster.written, 0)
        assert reader.report("digest").digest == cluster.digest()
        # Three times the budget of 5 % of a core at 100 changes a second.
        assert after.cpu - before.cpu < 0.05 * cluster.written / 100.0 * 3
        print(f"{rate:.0f} changes/s, {(after.cpu - before.cpu) / cluster.written * 1e6:.0f} us of CPU each")
