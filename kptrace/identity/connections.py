# SPDX-License-Identifier: Apache-2.0
"""Where the API server is, whom it trusts and who asks: in a pod by what the kubelet mounts there, else by a kubeconfig.

In a pod the `kubernetes` client is not imported: it would cost 18 MiB for the sake of two files and two variables.
"""

import os
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from kptrace.identity.api import ApiError

#: Where the kubelet puts the service account's token and the cluster's authority, and keeps them fresh.
ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_HOST = "KUBERNETES_SERVICE_HOST"
_PORT = "KUBERNETES_SERVICE_PORT"


@dataclass(frozen=True, slots=True)
class Connection:
    """An API server that can be asked.

    Attributes:
        host: its URL without a path.
        pool: a `urllib3.PoolManager` that knows its authority.
        authorization: gives the header of that name for the next request; empty for none.
    """

    host: str
    pool: Any
    authorization: Callable[[], str]


def connect(
    kubeconfig: Path | None = None, *, environ: Mapping[str, str] = os.environ, account: Path = ACCOUNT
) -> Connection:
    """Use this kubeconfig; without one what a pod has, else the default kubeconfig.

    Raises:
        ApiError: there is no usable configuration.
    """
    try:
        if kubeconfig is None and environ.get(_HOST):
            return _in_cluster(environ, account)
        return _by_kubeconfig(kubeconfig)
    except Exception as error:  # the client lets the errors of a dozen libraries and its own through
        raise unusable(error) from error


def unusable(error: Exception) -> ApiError:
    """That there is no usable configuration, for this reason."""
    text = " ".join(str(error).split())[:200]
    return ApiError("no_configuration", f"no usable Kubernetes configuration: {text}")


def _in_cluster(environ: Mapping[str, str], account: Path) -> Connection:
    import urllib3  # noqa: PLC0415 - megabytes, only where there is an API server

    name = environ[_HOST]
    host = f"[{name}]" if ":" in name else name
    context = ssl.create_default_context(cafile=str(account / "ca.crt"))
    token = account / "token"

    def authorization() -> str:
        # The kubelet replaces it long before it expires, and requests are minutes apart: so it is read for each.
        return f"Bearer {token.read_text(encoding='ascii').strip()}"

    return Connection(
        f"https://{host}:{environ.get(_PORT) or 443}", urllib3.PoolManager(ssl_context=context), authorization
    )


def _by_kubeconfig(path: Path | None) -> Connection:
    from kubernetes import client, config  # noqa: PLC0415 - as above
    from kubernetes.client.rest import RESTClientObject  # noqa: PLC0415

    configuration = client.Configuration()
    where = str(path) if path else None
    cast("Any", config).load_kube_config(config_file=where, client_configuration=configuration)

    def authorization() -> str:
        # The first is the name in new releases of the client, the second in old ones.
        found = (configuration.get_api_key_with_prefix(name) for name in ("BearerToken", "authorization"))
        return next(filter(None, found), "")

    return Connection(configuration.host, RESTClientObject(configuration).pool_manager, authorization)
