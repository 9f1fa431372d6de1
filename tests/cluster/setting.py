# SPDX-License-Identifier: Apache-2.0
"""A cluster with Services, the real kube-proxy and the real kptrace, with one that a test scales."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from kptrace.experiments import manifests
from kptrace.experiments.services import ServiceSpec
from kptrace.model.identity import Endpoint
from tests.cluster.controlplane import ControlPlane
from tests.cluster.kptrace import Changed, Kptrace
from tests.cluster.kubeproxy import KubeProxy
from tests.cluster.writertools import WriterTools

_TRIGGER = "endpoints.kubernetes.io/last-change-trigger-time"


@dataclass(frozen=True, slots=True)
class Extent:
    """How much the tests of programming latency do.

    Attributes:
        services: that there are.
        failing_seconds: for how long kube-proxy's tools fail, and `retry` is kube-proxy's pause after that.
        held_seconds: for how long one of them stands still.
        outage_seconds: for how long there is no API server.
    """

    services: int
    failing_seconds: float
    retry: str
    held_seconds: float
    outage_seconds: float


SHORT = Extent(100, 3.0, "5s", 6.0, 0.0)
LONG = Extent(1000, 35.0, "30s", 60.0, 60.0)


@dataclass
class Setting:
    """A cluster with Services, its kube-proxy, and kptrace beside it.

    Attributes:
        web: the Service that is scaled, as it was written last.
    """

    plane: ControlPlane
    proxy: KubeProxy
    kptrace: Kptrace
    tools: WriterTools
    trace: Path
    web: ServiceSpec

    def scale(self, endpoints: Sequence[Endpoint]) -> int:
        """Write the EndpointSlice of `web` with these; returns when that began, ns since 1970."""
        self.web = replace(self.web, endpoints=tuple(endpoints))
        made = manifests.objects([self.web])[1]
        now = datetime.now(UTC).isoformat().replace("+00:00", "Z")
        made["metadata"]["annotations"] = {_TRIGGER: now}
        begin = time.time_ns()
        self.plane.client.replace(made)
        return begin

    def changes(self, count: int) -> list[Changed]:
        """The last changes, which are of `web`."""
        found = self.kptrace.changes()[-count:]
        assert {change.service for change in found} == {f"{self.web.full_name}/tcp"}
        return found


def ends(count: int, first: int = 0) -> list[Endpoint]:
    """Endpoints of the scaled Service: always the same for the same numbers."""
    return [
        Endpoint(f"10.246.{number // 250}.{1 + number % 250}", 8080, node=f"node-{number % 3}")
        for number in range(first, first + count)
    ]
