# SPDX-License-Identifier: Apache-2.0
"""What a user can set: one frozen value, checked once, from flags, environment and file alike."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kptrace.kernel.host import Host
from kptrace.model.errors import UsageError
from kptrace.signals.sampling import Sampling

IdentityLevel = Literal["none", "services", "full"]
LookupMechanism = Literal["auto", "bracket", "fentry", "kprobe", "off"]

#: Not on Prometheus' list of default ports when it was chosen (see docs/adr).
DEFAULT_LISTEN = "127.0.0.1:10777"


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that `kptrace run` can be told.

    Attributes:
        netns: path of the network namespace to watch; None for the daemon's own.
        listen: `ADDRESS:PORT` or `[ADDRESS]:PORT` of the metrics server; port 0 takes any free one.
        tls_certificate, tls_key: PEM files; both or neither.
        tls_client_ca: PEM file: clients must show a certificate that it signed.
        identity_file: manifests instead of the API server.
        identity: which objects are watched at the API server.
        kubeconfig: file; None for the in-cluster configuration, or none at all outside a cluster.
        node_name: this node's name, for pods and the node object.
        sampling: divisors of first packets and of the rest.
        overhead_budget: share of one core that look-ups may cost; 0 for no limit.
        brackets_with_nfqueue: bracket a namespace that has an NFQUEUE too.
        lookup_mechanism: auto (the first that works), one of the mechanisms, or off.
        rewrites: whether rule changes are measured.
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
    identity_file: Path | None = None
    identity: IdentityLevel = "services"
    kubeconfig: Path | None = None
    node_name: str = ""
    sampling: Sampling = Sampling()
    overhead_budget: float = 0.005
    brackets_with_nfqueue: bool = False
    lookup_mechanism: LookupMechanism = "auto"
    rewrites: bool = True
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


def parse_budget(text: str) -> float:
    """Read `--overhead-budget`: `0.5%` or a share such as `0.005`; `off` for none.

    Raises:
        UsageError: it is neither, or beyond 100 %.
    """
    if text == "off":
        return 0.0
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 < share <= 1:
        raise UsageError(
            f"--overhead-budget {text!r} is not a share of one core", remedy="give for example 0.5%, or off"
        )
    return share
