# SPDX-License-Identifier: Apache-2.0
"""etcd and kube-apiserver on free ports of the loopback address: TLS, RBAC, no controllers.

What controllers do elsewhere, tests do themselves: they write EndpointSlices, statuses and Nodes.
"""

import contextlib
import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from kptrace.experiments.services import PLANS
from kptrace.model.netfilter import IpFamily
from tests.cluster.certificates import Authority, KeyPair, make_key
from tests.cluster.client import Client, StatusError
from tests.cluster.programs import HeldPort, Program, find

_OK = 200
_READY_SECONDS = 90.0
#: The API server announces where it is, and refuses a loopback address there. Nothing asks it at this one.
_ADVERTISED = "192.0.2.1"
_SERVICE_RANGE = ",".join(str(PLANS[family].services) for family in (IpFamily.IPV4, IpFamily.IPV6))


class ControlPlane:
    """A context manager: a ready API server inside, nothing of it afterwards.

    Attributes:
        port: where the API server listens.
        authority: signs its certificate, and those of its clients.
        client: asks as an administrator.
        etcd, server: the running programs; the server is None before its first start.
        startup_seconds: from the start of etcd until all was ready.
    """

    client: Client
    etcd: Program

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = Authority(folder)
        self.startup_seconds = 0.0
        self.server: Program | None = None
        self._cleanup = contextlib.ExitStack()
        self._api_port, self._etcd_port = HeldPort(), HeldPort()
        self.port = self._api_port.number
        self._etcd_url = f"http://127.0.0.1:{self._etcd_port.number}"
        self._server_pair = self.authority.server(
            "kube-apiserver", "DNS:localhost", "DNS:kubernetes.default.svc", "IP:127.0.0.1"
        )
        self._token_key = make_key(folder / "service-accounts.key")

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            for port in (self._api_port, self._etcd_port):
                stack.callback(port.close)
            administrator = self.authority.client("administrator", group="system:masters")
            self.client = stack.enter_context(self.connect(administrator))
            self.etcd = stack.enter_context(Program(self._etcd_line(), self.folder / "etcd.log"))
            self.startup_seconds = self.etcd.wait_until(self._etcd_answers, "healthy")
            stack.callback(self.stop_server)
            self.startup_seconds += self.start_server()
            self._cleanup = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cleanup.close()

    def connect(self, pair: KeyPair) -> Client:
        """A client by certificate."""
        return Client(self.port, self.authority.certificate, pair=pair)

    def start_server(self) -> float:
        """Start the API server, at the same port and on the same data; returns the seconds until it was ready."""
        # It collects garbage a fifth as often as it would: a third less of the CPU that tests and it share.
        environ = {**os.environ, "GOGC": "400"}
        self.server = Program(self._server_line(), self.folder / "kube-apiserver.log", environ=environ)
        # Its own Service is the last thing that it writes.
        return self.server.wait_until(self._ready, "ready", seconds=_READY_SECONDS)

    def stop_server(self) -> None:
        """End the API server at once: in order, it would wait for its watches. Idempotent."""
        if self.server is not None:
            self.server.kill()

    @contextlib.contextmanager
    def outage(self) -> Iterator[None]:
        """No API server while the body runs."""
        self.stop_server()
        try:
            yield
        finally:
            self.start_server()

    def kubeconfig(self, name: str, user: dict[str, str]) -> Path:
        """A kubeconfig with this user's credentials, as it is valid in every namespace that has a relay."""
        path = self.folder / f"{name}.kubeconfig"
        cluster = {
            "server": f"https://127.0.0.1:{self.port}",
            "certificate-authority": str(self.authority.certificate),
        }
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [{"name": name, "user": user}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": name}}],
            "current-context": "test",
        }
        path.write_text(json.dumps(config, indent=1), encoding="utf-8")  # JSON is YAML too
        return path

    def kubeconfig_of(self, name: str, *, group: str = "") -> Path:
        """A kubeconfig of a user with a client certificate: `system:kube-proxy` has its role from the start."""
        pair = self.authority.client(name, group=group)
        user = {"client-certificate": str(pair.certificate), "client-key": str(pair.key)}
        return self.kubeconfig(name.replace(":", "-"), user)

    def _etcd_answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self._etcd_url}/health", timeout=1.0) as answer:  # noqa: S310 - http, ours
                return bool(answer.status == _OK)
        except (OSError, urllib.error.URLError):
            return False

    def _ready(self) -> bool:
        with contextlib.suppress(OSError, StatusError):
            if self.client.raw("GET", "/readyz")[0] == _OK:
                return bool(self.client.request("GET", "/api/v1/namespaces/default/services/kubernetes"))
        return False

    def _etcd_line(self) -> list[str]:
        return [
            find("etcd"),
            f"--data-dir={self.folder / 'etcd'}",
            f"--listen-client-urls={self._etcd_url}",
            f"--advertise-client-urls={self._etcd_url}",
            "--listen-peer-urls=http://127.0.0.1:0",
            "--socket-reuse-port",
            "--unsafe-no-fsync",
            "--log-level=warn",
        ]

    def _server_line(self) -> list[str]:
        return [
            find("kube-apiserver"),
            f"--etcd-servers={self._etcd_url}",
            "--bind-address=127.0.0.1",
            f"--secure-port={self.port}",
            "--permit-port-sharing",
            f"--advertise-address={_ADVERTISED}",
            f"--tls-cert-file={self._server_pair.certificate}",
            f"--tls-private-key-file={self._server_pair.key}",
            f"--client-ca-file={self.authority.certificate}",
            "--authorization-mode=RBAC",
            "--allow-privileged",
            f"--service-cluster-ip-range={_SERVICE_RANGE}",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={self._token_key}",
            f"--service-account-signing-key-file={self._token_key}",
            # It would wait for the default account of each namespace, which a controller makes.
            "--disable-admission-plugins=ServiceAccount",
            "--delete-collection-workers=8",
        ]
