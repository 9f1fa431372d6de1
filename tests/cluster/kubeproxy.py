# SPDX-License-Identifier: Apache-2.0
"""The real kube-proxy in a network namespace of the test's own, in any of its three modes."""

import contextlib
import json
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Self

from kptrace.experiments.netns import Namespace
from kptrace.experiments.scrape import Scrape, fetch
from kptrace.experiments.services import PLANS
from kptrace.model.errors import KptraceError
from tests.cluster.client import Client
from tests.cluster.controlplane import ControlPlane
from tests.cluster.objects import node, reachable
from tests.cluster.programs import ClusterError, Program, find

#: In its own namespace these are always free, and they are what kube-proxy uses on every node.
METRICS_PORT = 10249
HEALTHZ_PORT = 10256
NODE_ADDRESSES = ("192.0.2.10", "fd00:99::10")
ZONE_LABEL = "topology.kubernetes.io/zone"
_RELAY = Path(__file__).parent / "relay.py"
_OK = 200
_LAST = "kubeproxy_sync_proxy_rules_last_timestamp_seconds"
_QUEUED = "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds"
_PENDING = (
    "kubeproxy_sync_proxy_rules_service_changes_pending",
    "kubeproxy_sync_proxy_rules_endpoint_changes_pending",
)
_FAMILIES = ("IPv4", "IPv6")


class Mode(StrEnum):
    """What kube-proxy writes, and by which tools."""

    NFTABLES = "nftables"
    IPTABLES_NFT = "iptables-nft"
    IPTABLES_LEGACY = "iptables-legacy"

    @property
    def proxy_mode(self) -> str:
        """As kube-proxy calls it."""
        return "nftables" if self is Mode.NFTABLES else "iptables"


@dataclass(frozen=True, slots=True)
class Settings:
    """What tests decide of a kube-proxy.

    Attributes:
        mode: data plane, and variant of the iptables tools.
        min_sync_period: rest between two syncs; kube-proxy's own default is 1s.
        sync_period: when a failed sync is tried again, and a full one comes at the latest.
        node: the name of its node.
        zone: its node's topology zone; empty for none.
        verbosity: of its log; 4 tells every sync and every endpoint's latency.
        tools: a folder for the front of its PATH.
        prefix: words before its command: a program that becomes it.
    """

    mode: Mode = Mode.NFTABLES
    min_sync_period: str = "10ms"
    sync_period: str = "30s"
    node: str = "node-0"
    zone: str = ""
    verbosity: int = 4
    tools: Path | None = None
    prefix: tuple[str, ...] = ()

    def config(self, kubeconfig: Path) -> str:
        """The file for its `--config`."""
        syncs = {"minSyncPeriod": self.min_sync_period, "syncPeriod": self.sync_period}
        return json.dumps(
            {
                "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
                "kind": "KubeProxyConfiguration",
                "mode": self.mode.proxy_mode,
                "clientConnection": {"kubeconfig": str(kubeconfig)},
                "hostnameOverride": self.node,
                "clusterCIDR": ",".join(str(plan.cluster) for plan in PLANS.values()),
                "detectLocalMode": "ClusterCIDR",
                "iptables": syncs,
                "nftables": syncs,
                "metricsBindAddress": f"127.0.0.1:{METRICS_PORT}",
                "healthzBindAddress": f"127.0.0.1:{HEALTHZ_PORT}",
                "oomScoreAdj": 0,
                # The machine's connection tracking is not the test's to set.
                "conntrack": {"maxPerCore": 0, "min": 0},
                "logging": {"verbosity": self.verbosity},
            },
            indent=1,
        )


def iptables_variant(folder: Path, variant: str) -> Path:
    """A folder for the front of PATH where `iptables` and its relatives are this variant.

    The programs know by their own names what to do, so a link to `xtables-nft-multi` suffices, and the machine's
    alternatives stay as they are.

    Raises:
        ClusterError: the variant is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    multi = shutil.which(f"xtables-{variant}-multi")
    if multi is None:
        raise ClusterError(f"there is no xtables-{variant}-multi: apt-get install iptables")
    for name in ("iptables", "ip6tables"):
        for suffix in ("", "-save", "-restore"):
            link = folder / f"{name}{suffix}"
            if not link.is_symlink():
                link.symlink_to(multi)
    return folder


class KubeProxy:
    """A context manager: a synced kube-proxy inside, nothing of it afterwards. Start it on the main thread.

    Attributes:
        settings: as it was started.
        program: the running process.
        startup_seconds: from its start until both families were synced once.
    """

    program: Program

    def __init__(
        self, plane: ControlPlane, namespace: Namespace, folder: Path, settings: Settings | None = None
    ) -> None:
        self.settings = settings or Settings()
        self.startup_seconds = 0.0
        self._plane = plane
        self._namespace = namespace
        self._folder = folder
        self._cleanup = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            # It waits half a minute for a node that is not there or has no address.
            stack.enter_context(_node(self._plane.client, self.settings))
            self._namespace.ip(f"addr replace {address} dev lo" for address in NODE_ADDRESSES)
            stack.enter_context(self._relay())
            self.program = stack.enter_context(self._start())
            self.startup_seconds = self.program.wait_until(self._synced_once, "first sync", seconds=60.0)
            self._cleanup = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cleanup.close()

    def scrape(self) -> Scrape:
        """Its own /metrics.

        Raises:
            OSError: it does not answer.
        """
        status, text = self._namespace.call(lambda: fetch(METRICS_PORT))
        if status != _OK:
            raise ConnectionError(f"/metrics answered {status}")
        return Scrape(text)

    def crash(self) -> None:
        """End it as a crash would; its rules stay."""
        self.program.kill()

    def restart(self) -> None:
        """Start it again after `crash`, over the rules that there are, and wait for its first sync."""
        self.program = self._cleanup.enter_context(self._start())
        self.startup_seconds = self.program.wait_until(self._synced_once, "first sync", seconds=60.0)

    def healthy(self) -> bool:
        """What load balancers ask: whether its rules are not too old."""
        try:
            return self._namespace.call(lambda: fetch(HEALTHZ_PORT, "/healthz"))[0] == _OK
        except OSError:
            return False

    def syncs(self) -> int:
        """How many syncs it counts, failed ones too."""
        return self.scrape().distribution("kubeproxy_sync_proxy_rules_duration_seconds").count

    def wait_synced(self, since: float, *, seconds: float = 30.0) -> float:
        """Wait until what was written after `since` (epoch seconds) was queued and synced, by its own metrics.

        They cannot tell a change that came while a sync ran from one that the sync has done: a sync that is to be exact
        for more than one change is waited for by what is in the kernel (`rules.installed`).
        """
        return self.program.wait_until(lambda: self._synced(since), "synced", seconds=seconds)

    def _synced_once(self) -> bool:
        try:
            scrape = self.scrape()
        except (OSError, KptraceError):
            return False
        return all(scrape.total(_LAST, ip_family=family) > 0 for family in _FAMILIES)

    def _synced(self, since: float) -> bool:
        scrape = self.scrape()
        queued = {family: scrape.total(_QUEUED, ip_family=family) for family in _FAMILIES}
        done = all(scrape.total(_LAST, ip_family=family) >= at for family, at in queued.items())
        return done and max(queued.values()) >= since and not any(map(scrape.total, _PENDING))

    def _start(self) -> Program:
        config = self._folder / "kube-proxy.config"
        config.write_text(
            self.settings.config(self._plane.kubeconfig_of("system:kube-proxy")), encoding="utf-8"
        )
        path = os.environ["PATH"]
        if self.settings.mode is not Mode.NFTABLES:
            variant = self.settings.mode.removeprefix("iptables-")
            path = f"{iptables_variant(self._folder / 'bin', variant)}{os.pathsep}{path}"
        if self.settings.tools is not None:
            path = f"{self.settings.tools}{os.pathsep}{path}"
        line = [*self.settings.prefix, find("kube-proxy"), f"--config={config}"]
        log = self._folder / "kube-proxy.log"
        return Program(
            ["nsenter", f"--net={self._namespace.path}", "--", *line],
            log,
            name="kube-proxy",
            environ={**os.environ, "PATH": path},
        )

    @contextlib.contextmanager
    def _relay(self) -> Iterator[Program]:
        """Make the API server answer at its own address inside of the namespace too."""
        port = self._plane.port
        listener = self._namespace.call(lambda: socket.create_server(("127.0.0.1", port)))
        with listener:
            number = listener.fileno()
            line = [sys.executable, "-I", "-S", str(_RELAY), str(number), str(port)]
            relay = Program(line, self._folder / "relay.log", name="relay", pass_fds=(number,))
        with relay:
            yield relay


@contextlib.contextmanager
def _node(client: Client, settings: Settings) -> Iterator[None]:
    """The node that it runs on."""
    name = settings.node
    made = client.create(node(name, labels={ZONE_LABEL: settings.zone} if settings.zone else {}))
    try:
        client.set_status(made, reachable(name, *NODE_ADDRESSES))
        yield
    finally:
        client.delete(made)
