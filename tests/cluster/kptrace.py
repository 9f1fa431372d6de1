# SPDX-License-Identifier: Apache-2.0
"""The real kptrace beside the real kube-proxy: under the account of deploy/, and what it says of changes."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from kptrace.experiments.daemon_process import DaemonProcess, DaemonRequest, default_command
from kptrace.experiments.netns import Namespace
from kptrace.experiments.scrape import fetch
from tests.cluster.accounts import apply, manifest, token_kubeconfig
from tests.cluster.controlplane import ControlPlane
from tests.cluster.programs import wait_for

MANIFEST = Path(__file__).parents[2] / "deploy" / "daemonset.yaml"
FATES = ("programmed", "early", "superseded", "unmeasured")


def kptrace_kubeconfig(plane: ControlPlane) -> Path:
    """A kubeconfig with a new token of kptrace's own account."""
    apply(plane.client, manifest(MANIFEST))
    return token_kubeconfig(plane, "kptrace", "kptrace")


@dataclass(frozen=True, slots=True)
class Changed:
    """One change whose fate is known: a row of /status. Times are ns since 1970."""

    kind: str
    fate: str
    service: str
    address: str
    received_ns: int
    committed_ns: int
    milliseconds: float
    attribution: str
    reason: str


@dataclass(frozen=True, slots=True)
class Account:
    """What became of all changes so far, by the counters in /metrics."""

    changes: int
    pending: int
    fates: Mapping[str, int]

    def since(self, before: "Account") -> "Account":
        """What became of those after `before`, where nothing was pending."""
        fates = {name: count - before.fates[name] for name, count in self.fates.items()}
        return Account(self.changes - before.changes, self.pending - before.pending, fates)

    @property
    def settled(self) -> bool:
        """Whether nothing is pending and every change has a fate."""
        return self.pending == 0 and sum(self.fates.values()) == self.changes

    @property
    def timed(self) -> int:
        """Changes whose commit is known: samples, and those that were early."""
        return self.fates["programmed"] + self.fates["early"]


class Kptrace(DaemonProcess):
    """A context manager: inside, kptrace has heard of everything that there is."""

    def __init__(
        self,
        netns: Namespace,
        kubeconfig: Path,
        folder: Path,
        cache: Path,
        options: Sequence[str] = (),
        *,
        signal: str = "programming",
    ) -> None:
        self._signal = signal
        request = DaemonRequest(netns.path, folder / "none", folder / "ready")
        argv = default_command(request)
        # Names come from the API server here.
        where = argv.index("--identity-file")
        del argv[where : where + 2]
        super().__init__(
            [
                *argv,
                *("--kubeconfig", str(kubeconfig), "--node-name", "node-0", "--programming-nodes", "100%"),
                *("--start-delay", "0", "--status-names", "--lookup-mechanism", "off"),
                *("--cache-dir", str(cache), *options),
            ],
            request.ready_file,
            folder / "kptrace.log",
        )
        self.log_file = folder / "kptrace.log"

    def __enter__(self) -> Self:
        super().__enter__()
        try:
            wait_for(
                lambda: self.state()["state"] == "active", "kptrace's names", detail=lambda: f"{self.state()}"
            )
        except BaseException:
            self.stop()
            raise
        return self

    def status(self) -> dict[str, Any]:
        """/status as it is."""
        found: dict[str, Any] = json.loads(fetch(self.port, "/status")[1])
        return found

    def state(self) -> dict[str, str]:
        """The state of the programming signal; of Cilium's where that was asked for."""
        (row,) = [row for row in self.status()["signals"] if row["signal"] == self._signal]
        state: dict[str, str] = row
        return state

    def account(self) -> Account:
        """What became of all changes so far."""
        scrape = self.scrape()
        fates = {
            "programmed": scrape.distribution("kptrace_programming_duration_seconds").count,
            **{name: int(scrape.total(f"kptrace_programming_{name}_total")) for name in FATES[1:]},
        }
        pending = int(scrape.total("kptrace_programming_pending"))
        return Account(int(scrape.total("kptrace_programming_changes_total")), pending, fates)

    def settle(self, changes: int, before: Account, *, seconds: float = 30.0) -> Account:
        """Wait until so many changes more were heard of than `before`, and none of them is pending."""

        def enough() -> bool:
            now = self.account().since(before)
            return now.changes >= changes and now.settled

        wait_for(
            enough, f"{changes} changes", seconds=seconds, detail=lambda: f"{self.account().since(before)}"
        )
        return self.account().since(before)

    def quiet(self, *, seconds: float = 60.0) -> Account:
        """Wait until nothing is pending and nothing new came for as long as a commit is looked back at."""
        last, since = self.account(), time.monotonic()

        def still() -> bool:
            nonlocal last, since
            now = self.account()
            if now != last or not now.settled:
                last, since = now, time.monotonic()
            return time.monotonic() - since > 2.0

        wait_for(still, "quiet", seconds=seconds, detail=lambda: f"{self.account()}")
        return last

    def changes(self) -> list[Changed]:
        """The last changes whose fate is known, the oldest first."""
        return [
            Changed(
                row["change"],
                row["fate"],
                row["service"],
                row.get("address", ""),
                round(row["received"] * 1e9),
                round(row.get("committed", 0.0) * 1e9),
                row.get("ms", 0.0),
                row.get("attribution", ""),
                row.get("reason", ""),
            )
            for row in reversed(
                self.status()["changes" if self._signal == "programming" else "datapath changes"]
            )
        ]
