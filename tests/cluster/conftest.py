# SPDX-License-Identifier: Apache-2.0
"""One real API server a run, and for each test a network namespace and a Kubernetes namespace of its own."""

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from kptrace.experiments.interrupts import interruptible
from kptrace.experiments.netns import Namespace, sweep
from tests.cluster import objects
from tests.cluster.controlplane import ControlPlane
from tests.cluster.kubeproxy import KubeProxy, Mode, Settings
from tests.cluster.programs import search_path


def pytest_configure() -> None:
    """Put what tools/build.sh built on the PATH, where the root conftest.py looks for it too."""
    os.environ["PATH"] = search_path()


@pytest.fixture(scope="session")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """A real API server with an empty cluster."""
    sweep()
    with interruptible(), ControlPlane(tmp_path_factory.mktemp("control-plane")) as started:
        print(f"API server ready after {started.startup_seconds:.1f} s")
        yield started


@pytest.fixture
def netns() -> Iterator[Namespace]:
    """A network namespace of the test's own."""
    with Namespace("cluster") as made:
        yield made


@pytest.fixture
def kube_namespace(plane: ControlPlane) -> Iterator[str]:
    """A Kubernetes namespace of the test's own; what was written in it is gone afterwards.

    The namespace itself stays: a controller would have to finish its removal.
    """
    name = f"test-{secrets.token_hex(4)}"
    plane.client.create(objects.namespace(name))
    yield name
    for api_version, kind in (("v1", "Service"), ("discovery.k8s.io/v1", "EndpointSlice"), ("v1", "Pod")):
        plane.client.delete_all(api_version, kind, name)


@pytest.fixture
def start_kube_proxy(
    plane: ControlPlane, netns: Namespace, tmp_path: Path
) -> Iterator[Callable[..., KubeProxy]]:
    """Start kube-proxy in the test's network namespace: a mode, and whatever else `Settings` has."""
    with ExitStack() as stack:

        def start(mode: Mode, **settings: object) -> KubeProxy:
            folder = tmp_path / f"kube-proxy-{secrets.token_hex(4)}"
            folder.mkdir()
            return stack.enter_context(KubeProxy(plane, netns, folder, Settings(mode, **settings)))

        yield start
