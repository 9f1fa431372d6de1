# SPDX-License-Identifier: Apache-2.0
"""Credentials that change under a running kptrace, on a real API server that refuses the old ones."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from kptrace.identity.client import KubernetesApi
from kptrace.identity.resources import Level, resources
from kptrace.identity.source import Identity
from kptrace.identity.watchfeed import WatchFeed
from kptrace.model.signal import State
from tests.cluster.accounts import apply, manifest, token
from tests.cluster.certificates import Authority
from tests.cluster.client import Client
from tests.cluster.controlplane import ControlPlane
from tests.cluster.objects import service
from tests.cluster.programs import wait_for

_MANIFEST = Path(__file__).parents[2] / "deploy" / "daemonset.yaml"


@pytest.fixture
def account(plane: ControlPlane, tmp_path: Path) -> Path:
    """What the kubelet mounts in a pod of deploy/."""
    apply(plane.client, manifest(_MANIFEST))
    shutil.copy(plane.authority.certificate, tmp_path / "ca.crt")
    (tmp_path / "token").write_text(token(plane.client, "kptrace", "kptrace"), encoding="ascii")
    return tmp_path


@pytest.fixture
def in_pod(plane: ControlPlane, account: Path) -> Iterator[Identity]:
    """Names as in a pod of deploy/; retries come soon."""
    environ = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(plane.port)}
    api = KubernetesApi(environ=environ, account=account)
    feed = WatchFeed(api, resources(Level.SERVICES), start_delay=0.0)
    identity = Identity(feed)
    identity.start()
    yield identity
    identity.close()


def _reason(identity: Identity) -> str:
    identity.poll()
    (state,) = identity.states()
    return state.reason


def _known(identity: Identity, name: str) -> bool:
    identity.poll()
    return name in {port.name for port in identity.snapshot().services.values()}


def _status(plane: ControlPlane, secret: str) -> int:
    """How the API server answers to a token now."""
    with Client(plane.port, plane.authority.certificate, token=secret) as client:
        return client.raw("GET", "/api/v1/services")[0]


def test_a_rotated_token_is_read_again(
    plane: ControlPlane, kube_namespace: str, account: Path, in_pod: Identity
) -> None:
    """The old token answers 401: that is said, the names stay, and the new one in its place is enough to go on."""
    plane.client.create(service("before", kube_namespace, "10.96.9.1"))
    wait_for(lambda: _known(in_pod, "before"), "names")
    old = (account / "token").read_text(encoding="ascii")
    gone = {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": {"namespace": "kptrace", "name": "kptrace"},
    }
    # A token dies with its account; one of the same name is another.
    plane.client.delete(gone)
    plane.client.create(gone)
    wait_for(lambda: _status(plane, old) == 401, "the old token's end")
    with plane.outage():
        wait_for(lambda: _reason(in_pod) not in ("", "ok"), "the outage")
    wait_for(lambda: _reason(in_pod) == "unauthorized", "the refusal", seconds=60.0)
    assert _known(in_pod, "before")

    (account / "token").write_text(token(plane.client, "kptrace", "kptrace"), encoding="ascii")
    plane.client.create(service("after", kube_namespace, "10.96.9.2"))
    wait_for(lambda: _known(in_pod, "after"), "names by the new token", seconds=90.0)
    (state,) = in_pod.states()
    assert state.state is State.ACTIVE


def test_a_replaced_authority_is_read_again(
    plane: ControlPlane, kube_namespace: str, account: Path, tmp_path: Path
) -> None:
    """While the authority is a stranger's nothing is said to the API server; the right one in its place is enough."""
    plane.client.create(service("web", kube_namespace, "10.96.9.1"))
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    shutil.copy(Authority(stranger).certificate, account / "ca.crt")
    environ = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(plane.port)}
    feed = WatchFeed(
        KubernetesApi(environ=environ, account=account), resources(Level.SERVICES), start_delay=0.0
    )
    identity = Identity(feed)
    try:
        identity.start()
        wait_for(lambda: _reason(identity) == "tls", "the refusal")
        shutil.copy(plane.authority.certificate, account / "ca.crt")
        wait_for(lambda: _known(identity, "web"), "names", seconds=60.0)
    finally:
        identity.close()
