# SPDX-License-Identifier: Apache-2.0
"""One real API server a run, and for each test a network namespace and a Kubernetes namespace of its own."""

import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from kptrace.experiments import manifests
from kptrace.experiments.interrupts import interruptible
from kptrace.experiments.netns import Namespace, sweep
from kptrace.experiments.services import make_services
from tests.cluster import objects
from tests.cluster.committing import trace_prefix
from tests.cluster.controlplane import ControlPlane
from tests.cluster.kptrace import Kptrace, kptrace_kubeconfig
from tests.cluster.kubeproxy import KubeProxy, Mode, Settings
from tests.cluster.programs import search_path
from tests.cluster.setting import LONG, SHORT, Extent, Setting
from tests.cluster.writertools import WriterTools


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option of this tier."""
    parser.addoption("--long", action="store_true", help="programming latency at full length and scale")


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


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where kptrace keeps what it compiled: once a run."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture
def start_kptrace(
    plane: ControlPlane, netns: Namespace, tmp_path: Path, compiled: Path
) -> Iterator[Callable[..., Kptrace]]:
    """Start kptrace beside the test's network namespace, with more options; it has heard of everything then."""
    with ExitStack() as stack:

        def start(*options: str, kubeconfig: Path | None = None, signal: str = "programming") -> Kptrace:
            folder = tmp_path / f"kptrace-{secrets.token_hex(4)}"
            folder.mkdir()
            config = kubeconfig or kptrace_kubeconfig(plane)
            return stack.enter_context(Kptrace(netns, config, folder, compiled, options, signal=signal))

        yield start


@pytest.fixture
def extent(request: pytest.FixtureRequest) -> Extent:
    """How much the tests of programming latency do."""
    return LONG if request.config.getoption("--long") else SHORT


@pytest.fixture
def start_setting(
    plane: ControlPlane,
    kube_namespace: str,
    start_kube_proxy: Callable[..., KubeProxy],
    start_kptrace: Callable[..., Kptrace],
    tmp_path: Path,
    extent: Extent,
) -> Callable[..., Setting]:
    """Everything in one mode: kptrace's options and kubeconfig, whether strace watches, what `Settings` of kube-proxy has."""

    def start(
        mode: Mode,
        *,
        kubeconfig: Path | None = None,
        traced: bool = False,
        options: Sequence[str] = (),
        **settings: object,
    ) -> Setting:
        specs = list(make_services(extent.services, 2, namespace=kube_namespace))
        specs[0] = replace(specs[0], endpoints=specs[0].endpoints[:1])
        plane.client.create_all(manifests.objects(specs))
        tools, trace = WriterTools(tmp_path / "writer", mode), tmp_path / "strace.log"
        prefix = trace_prefix(trace) if traced else ()
        proxy = start_kube_proxy(
            mode, **{"min_sync_period": "1s", "tools": tools.path, "prefix": prefix, **settings}
        )
        kptrace = start_kptrace(*options, kubeconfig=kubeconfig)
        return Setting(plane, proxy, kptrace, tools, trace, specs[0])

    return start
