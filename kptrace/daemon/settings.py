# SPDX-License-Identifier: Apache-2.0
"""What a user can set: one frozen value, checked once, from flags, environment and file alike."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kptrace.kernel.host import Host
from kptrace.model.errors import UsageError
from kptrace.signals.sampling import Sampling

IdentityLevel = Literal["none", "services", "full"]
BpfStatistics = Literal["minute", "always", "off"]
LookupMechanism = Literal["auto", "bracket", "fentry", "kprobe", "off"]

#: Not on Prometheus' list of default ports when it was chosen (see docs/adr).
DEFAULT_LISTEN = "127.0.0.1:10777"
DEFAULT_SOCKET = "/run/kptrace/kptrace.sock"


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that `kptrace run` can be told.

    Attributes:
        netns: path of the network namespace to watch; None for the daemon's own.
        listen: `ADDRESS:PORT` or `[ADDRESS]:PORT` of the metrics server; port 0 takes any free one.
        tls_certificate, tls_key: PEM files; both or neither.
        tls_client_ca: PEM file: clients must show a certificate that it signed.
        local_socket: where those who may open it are told all names; None for nowhere.
        identity_file: manifests instead of the API server.
        identity: which objects are watched at the API server.
        kubeconfig: file; None for the in-cluster configuration, or none at all outside a cluster.
        start_delay: longest random wait before the first request to the API server, seconds.
        kube_proxy_metrics: URL of kube-proxy's own metrics server; empty: it is not asked.
        cilium_metrics: URL of the own metrics of Cilium's agent; auto: where it has them by default, if it answers; none: it
            is not asked.
        node_name: this node's name, for pods and the node object.
        sampling: divisors of first packets and of the rest.
        overhead_budget: share of one core that look-ups may cost; 0 for no limit.
        brackets_with_nfqueue: bracket a namespace that has an NFQUEUE too.
        lookup_mechanism: auto (the first that works), one of the mechanisms, or off.
        bpf_statistics: where Cilium's programs cannot be traced: have the kernel count their runs for a second a minute,
            always, or not at all.
        rewrites: whether rule changes are measured.
        programming_nodes: share of the cluster's nodes that watch EndpointSlices, and so know how long a change takes
            to reach the kernel; which ones follows from their names.
        drift_after: how long a difference between the API and the installed rules must last, seconds.
        writers: `NAME=PATTERN` additions to the table of writers.
        max_series: series that one scrape may have.
        status_names: whether /status may show names of services and pods.
        cache_dir: where compiled programs are kept; None compiles at every start.
        ready_file: written with the port once samples can come; for scripts and tests.
        host: roots of the host's file systems.
    """

    netns: Path | None = None
    listen: str = DEFAULT_LISTEN
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    local_socket: Path | None = None
    identity_file: Path | None = None
    identity: IdentityLevel = "services"
    kubeconfig: Path | None = None
    start_delay: float = 60.0
    node_name: str = ""
    kube_proxy_metrics: str = ""
    cilium_metrics: str = "none"
    sampling: Sampling = Sampling()
    overhead_budget: float = 0.005
    brackets_with_nfqueue: bool = False
    lookup_mechanism: LookupMechanism = "auto"
    bpf_statistics: BpfStatistics = "minute"
    rewrites: bool = True
    programming_nodes: float = 0.05
    drift_after: float = 60.0
    writers: tuple[str, ...] = ()
    max_series: int = 4000
    status_names: bool = False
    cache_dir: Path | None = None
    ready_file: Path | None = None
    host: Host = Host()

    def address(self) -> tuple[str, int]:
        """The listen address as host and port.

        Raises:
            UsageError: it is not `ADDRESS:PORT`.
        """
        host, colon, port = self.listen.rpartition(":")
        if not colon or not port.isdigit() or int(port) > 0xFFFF:
            raise UsageError(
                f"--listen {self.listen!r} is not ADDRESS:PORT",
                remedy="give for example 127.0.0.1:10777 or [::1]:10777",
            )
        return host.strip("[]") or "0.0.0.0", int(port)  # noqa: S104  (":10777" asks for every address)


def programming_off(settings: Settings) -> str:
    """Why this node does not measure how long changes take to reach the kernel; empty if it does."""
    if not settings.rewrites:
        return "--no-rewrites"
    if settings.identity_file is not None:
        return "--identity-file: nothing tells of changes as they happen"
    if settings.identity == "none":
        return "--identity=none"
    share = settings.programming_nodes
    if share < 1 and not (settings.node_name and _place(settings.node_name) < share):
        which = "this node is not among them" if settings.node_name else "this node has no --node-name"
        return f"--programming-nodes={100 * share:g}%: {which}"
    return ""


def _place(name: str) -> float:
    """Where a name is among all names, from 0 to 1: another version of kptrace must choose the same nodes."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / (1 << 64)


def parse_share(text: str) -> float:
    """Read `--programming-nodes`: `5%` or a share such as `0.05`; `off` for none.

    Raises:
        UsageError: it is neither, or beyond 100 %.
    """
    return _share(text, "--programming-nodes", "is not a share of the nodes", "5%")


def parse_budget(text: str) -> float:
    """Read `--overhead-budget`: `0.5%` or a share such as `0.005`; `off` for none.

    Raises:
        UsageError: it is neither, or beyond 100 %.
    """
    return _share(text, "--overhead-budget", "is not a share of one core", "0.5%")


def _share(text: str, option: str, problem: str, example: str) -> float:
    if text == "off":
        return 0.0
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 < share <= 1:
        raise UsageError(f"{option} {text!r} {problem}", remedy=f"give for example {example}, or off")
    return share
