# SPDX-License-Identifier: Apache-2.0
"""What the running parts tell besides metrics: losses, the sections of /status, records, and single Services."""

from collections.abc import Mapping, Sequence

from kptrace.daemon.explaining import explain_service
from kptrace.daemon.part import Node, Running


class Reports:
    """Asks whatever runs at the moment; for any thread."""

    def __init__(self, node: Node, running: Sequence[Running]) -> None:
        """Tell of `running`, to which its owner may append."""
        self._node = node
        self._running = running

    def proxy(self) -> tuple[str, str]:
        """kube-proxy's mode and version, as it says itself; empty where nobody asks it."""
        return self._node.shared.proxy()

    def losses(self) -> Mapping[tuple[str, str], int]:
        """Lost events by signal and reason."""
        totals = {("daemon", "callback_failed"): self._node.loop.failures}
        for source in self._running:
            totals.update(source.losses())
        return totals

    def sections(self, *, names: bool) -> Mapping[str, object]:
        """What /status shows besides the states; names of services and pods only where `names`."""
        losses = {f"{signal}/{reason}": count for (signal, reason), count in self.losses().items()}
        sections: dict[str, object] = {"netns": str(self._node.settings.netns or "own")}
        for source in self._running:
            sections.update(source.status(names=names))
        return {**sections, "records": self._node.shared.recorder.rows(names=names), "losses": losses}

    def record(self, number: str) -> Mapping[str, object] | None:
        """One record of the flight recorder, with names; None if there is none of this number."""
        return self._node.shared.recorder.row(number)

    def explain(self, namespace: str, name: str) -> Mapping[str, object] | None:
        """All that is known of a Service, with names; None if nobody knows it."""
        shared, snapshot = self._node.shared, self._node.identity.snapshot()
        return explain_service((namespace, name), snapshot, shared.recorder, shared.explain)
