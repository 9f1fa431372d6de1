# SPDX-License-Identifier: Apache-2.0
"""A large cluster on the real API server: filled, changed at a steady rate, and compared with what kptrace knows."""

import ipaddress
import json
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from kptrace.experiments import manifests
from kptrace.experiments.services import PLANS, ServiceSpec
from kptrace.model.identity import Endpoint, Protocol, ServiceAddress, ServicePort
from kptrace.model.netfilter import IpFamily
from tests.cluster.accounts import apply, manifest, token
from tests.cluster.client import Object
from tests.cluster.controlplane import ControlPlane
from tests.cluster.programs import wait_for
from tests.cluster.reader import checksum

_ROOT = Path(__file__).parents[2]
MANIFEST = _ROOT / "deploy" / "daemonset.yaml"
#: Nobody asks these addresses: two ranges that hold a million endpoints each.
_PODS = ipaddress.ip_address("10.128.0.0")
_CHANGED = ipaddress.ip_address("10.192.0.0")
_NODES = 2000
_WRITERS = 4


def make(services: int, endpoints: int, namespace: str) -> list[ServiceSpec]:
    """Services whose endpoints are pods, spread over the nodes of a large cluster."""
    found = []
    for number in range(services):
        name = f"web-{number:05d}"
        port = ServicePort(namespace, name, "http", Protocol.TCP)
        address = ServiceAddress(str(PLANS[IpFamily.IPV4].services[1000 + number]), 80, Protocol.TCP)
        ends = tuple(
            _pod(port, str(_PODS + number * endpoints + index), number * endpoints + index)
            for index in range(endpoints)
        )
        found.append(ServiceSpec(port, address, ends))
    return found


def _pod(port: ServicePort, ip: str, number: int) -> Endpoint:
    return Endpoint(
        ip, 8080, f"node-{number % _NODES:04d}", f"{port.namespace}/{port.name}-5d8f7c9b6-{number:06x}"
    )


class LargeCluster:
    """Services that exist, and what must be known of them.

    Attributes:
        plane: the API server.
        specs: as they are now.
        written: how many changes were made.
    """

    def __init__(self, plane: ControlPlane, services: int, endpoints: int, namespace: str) -> None:
        """Write them all."""
        self.plane = plane
        self.specs = make(services, endpoints, namespace)
        self.written = 0
        self._rng = random.Random(1)
        plane.client.create_all(manifests.objects(self.specs))

    def digest(self) -> str:
        """What `reader.digest` must be."""
        lines = []
        for item in self.plane.client.all_of("v1", "Service", "default"):  # the API server's own Service
            for port in item["spec"]["ports"]:
                name = f"default/{item['metadata']['name']}:{port['name']}"
                lines.append(f"{item['spec']['clusterIP']} {port['port']} {name}")
        for item in self.plane.client.all_of("discovery.k8s.io/v1", "EndpointSlice", "default"):
            name = f"default/{item['metadata']['labels']['kubernetes.io/service-name']}:{item['ports'][0]['name']}"
            lines.extend(
                f"{name} {end['addresses'][0]}:{item['ports'][0]['port']} " for end in item["endpoints"]
            )
        for spec in self.specs:
            lines.append(f"{spec.address.ip} {spec.address.port} {spec.full_name}")
            lines.extend(f"{spec.full_name} {end.ip}:{end.port} {end.node}" for end in spec.endpoints)
        return checksum(lines)

    def churn(self, rate: float, seconds: float) -> float:
        """Replace one endpoint of a random Service `rate` times a second; returns the rate that was reached.

        An object is not written by two writers at a time: the API server would take them in either order.
        """
        begin, count = time.monotonic(), round(rate * seconds)
        with ThreadPoolExecutor(_WRITERS) as pool:
            for batch in range(0, count, _WRITERS):
                size = min(_WRITERS, count - batch)
                chosen = self._rng.sample(range(len(self.specs)), size)
                list(pool.map(self.plane.client.replace, [self._changed(index) for index in chosen]))
                time.sleep(max(0.0, begin + (batch + size) / rate - time.monotonic()))
        return count / (time.monotonic() - begin)

    def _changed(self, index: int) -> Object:
        """The EndpointSlice of a Service of which one endpoint is another now."""
        spec = self.specs[index]
        which = self._rng.randrange(len(spec.endpoints))
        fresh = _pod(spec.port, str(_CHANGED + self.written), self.written)
        self.written += 1
        ends = (*spec.endpoints[:which], fresh, *spec.endpoints[which + 1 :])
        self.specs[index] = replace(spec, endpoints=ends)
        return manifests.objects([self.specs[index]])[1]


@dataclass(frozen=True, slots=True)
class Report:
    """What the reader says: memory in MiB, CPU in seconds."""

    ready: bool
    ready_cpu: float
    cpu: float
    rss_before: float
    rss: float
    peak: float
    services: int
    changes: int
    errors: float
    digest: str


class Reader:
    """A context manager: a process that knows all names of the API server."""

    def __init__(self, plane: ControlPlane, folder: Path, node: str = "node-0000") -> None:
        """Give it an account as a pod has it, in `folder`."""
        apply(plane.client, manifest(MANIFEST))
        folder.mkdir(exist_ok=True)
        (folder / "token").write_text(token(plane.client, "kptrace", "kptrace"), encoding="ascii")
        (folder / "ca.crt").write_bytes(plane.authority.certificate.read_bytes())
        self._argv = [
            sys.executable,
            "-m",
            "tests.cluster.reader",
            "127.0.0.1",
            str(plane.port),
            str(folder),
            node,
        ]

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            self._argv, cwd=_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._process:
            if self._process.stdin:
                self._process.stdin.close()
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()

    def report(self, question: str = "report") -> Report:
        """Ask it; a question `digest` costs it some time."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(f"{question}\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return Report(**answer)

    def wait_ready(self, *, seconds: float = 120.0) -> Report:
        """Wait until it knows everything."""
        wait_for(lambda: self.report().ready, "names", seconds=seconds)
        return self.report()

    def wait_for_changes(self, count: int, *, seconds: float = 30.0) -> Report:
        """Wait until it has heard of so many changes."""
        wait_for(
            lambda: self.report().changes >= count,
            f"{count} changes",
            seconds=seconds,
            detail=lambda: f"{self.report()}",
        )
        return self.report()
