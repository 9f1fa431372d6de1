# SPDX-License-Identifier: Apache-2.0
"""Connects by Service: which addresses the kernel's maps hold, and what was counted under each."""

from array import array
from collections.abc import Mapping
from typing import Final

from kptrace.model.identity import Snapshot
from kptrace.model.metrics import MetricFamily
from kptrace.model.netfilter import DataPlane
from kptrace.signals.datapath_cells import MECHANISM
from kptrace.signals.datapath_tracer import DatapathTracer
from kptrace.signals.lookup_services import (
    CELL_BYTES,
    SERVICE_SPEC,
    ServiceNumbers,
    ServiceTop,
    service_rows,
)

_PLANES: Final = (DataPlane.CILIUM,)


class ConnectServices:
    """The known Services of a tracer; `set_identity` and `choose` are for the loop's thread."""

    def __init__(self, tracer: DatapathTracer, named: int) -> None:
        """No Service is known yet; `named` of them get a series of their own."""
        self._tracer = tracer
        self._numbers = ServiceNumbers()
        self._top = ServiceTop(named, planes=_PLANES)

    def set_identity(self, snapshot: Snapshot) -> None:
        """Count connects to these Service addresses by name from now on."""
        self._tracer.set_services(self._numbers.entries(snapshot.services))

    def choose(self, now: float) -> None:
        """Choose anew which get a series of their own; `now` is in seconds."""
        if self._numbers.names:
            self._top.update(self._words(), len(self._numbers.names), now)

    def _words(self) -> "array[int]":
        used = len(self._numbers.names) * CELL_BYTES
        return array("Q", bytes(self._tracer.memory("service_cells")[:used]))

    def families(self) -> list[MetricFamily]:
        """The histograms; none where no Service is known."""
        # Names may be given meanwhile: the words read next are for at least as many as were counted here.
        known = list(self._numbers.names)
        if not known:
            return []
        return [MetricFamily(SERVICE_SPEC, list(self._top.samples(self._words(), known, MECHANISM)))]

    def status(self, *, names: bool) -> Mapping[str, object]:
        """How many are known; those with a series of their own only where `names` are allowed."""
        known = list(self._numbers.names)
        row: dict[str, object] = {"known": len(known), "refused": self._numbers.refused}
        if names:
            shown = (f"{s.namespace}/{s.name}:{s.port}/{s.protocol.name}" for s in self._top.named(known))
            row["named"] = ", ".join(shown)
        return row

    def rows(self, namespace: str, name: str) -> list[Mapping[str, object]]:
        """What connects to one Service cost, since the start."""
        # The words are read after the names: there are at least as many.
        known = list(self._numbers.names)
        return service_rows(self._words(), known, (namespace, name), planes=_PLANES)
