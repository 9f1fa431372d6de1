# SPDX-License-Identifier: Apache-2.0
"""Service accounts as pods have them: a role, and a token by TokenRequest."""

from collections.abc import Sequence
from pathlib import Path

import yaml

from tests.cluster.client import Client, Object, StatusError, collection
from tests.cluster.controlplane import ControlPlane

_CONFLICT = 409
_TOKEN_SECONDS = 3600


def apply(client: Client, objects: Sequence[Object]) -> None:
    """Create objects in order; one that is there already is replaced."""
    for obj in objects:
        try:
            client.create(obj)
        except StatusError as error:
            if error.code != _CONFLICT:
                raise
            client.replace(obj)


def manifest(path: Path) -> list[Object]:
    """The objects of a file."""
    return [obj for obj in yaml.safe_load_all(path.read_text(encoding="utf-8")) if obj]


def account(name: str, namespace: str, rules: Sequence[Object]) -> list[Object]:
    """A service account and the ClusterRole of its name with these rules."""
    role = f"{namespace}-{name}"
    authorization = "rbac.authorization.k8s.io"
    return [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"namespace": namespace, "name": name}},
        {
            "apiVersion": f"{authorization}/v1",
            "kind": "ClusterRole",
            "metadata": {"name": role},
            "rules": list(rules),
        },
        {
            "apiVersion": f"{authorization}/v1",
            "kind": "ClusterRoleBinding",
            "metadata": {"name": role},
            "roleRef": {"apiGroup": authorization, "kind": "ClusterRole", "name": role},
            "subjects": [{"kind": "ServiceAccount", "namespace": namespace, "name": name}],
        },
    ]


def token(client: Client, namespace: str, name: str, *, seconds: int = _TOKEN_SECONDS) -> str:
    """A new token of a service account, valid for at least 600 seconds."""
    path = f"{collection('v1', 'ServiceAccount', namespace)}/{name}/token"
    request: Object = {
        "apiVersion": "authentication.k8s.io/v1",
        "kind": "TokenRequest",
        "spec": {"expirationSeconds": seconds},
    }
    found: str = client.request("POST", path, request)["status"]["token"]
    return found


def token_kubeconfig(plane: ControlPlane, namespace: str, name: str) -> Path:
    """A kubeconfig with a new token of a service account, which is read anew from a file beside it."""
    path = plane.folder / f"{namespace}-{name}.token"
    path.write_text(token(plane.client, namespace, name), encoding="ascii")
    return plane.kubeconfig(f"{namespace}-{name}", {"tokenFile": str(path)})
