# SPDX-License-Identifier: Apache-2.0
"""Writes Services into Cilium's maps as its agent does, each entry by a call of its own. Measures nothing."""

import ctypes
import itertools
import random
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from kptrace.experiments import cilium_entries as entries
from kptrace.experiments.cilium_layouts import CONTROLS, LAYOUTS, MapName
from kptrace.experiments.cilium_maps import CiliumMaps
from kptrace.experiments.cilium_writes import Phase, ServiceTable, Write
from kptrace.experiments.services import ServiceSpec, change_endpoint
from kptrace.kernel.maps import Map
from kptrace.kernel.syscall import bpf_inout
from kptrace.model.errors import KptraceError

_UPDATE_BATCH, _DELETE_BATCH = 26, 27  # enum bpf_cmd
_BATCH = struct.Struct("=QQQQIIQQ")  # in_batch, out_batch, keys, values, count, map_fd, elem_flags, flags


@dataclass(frozen=True, slots=True)
class MapsWritten:
    """What a writer did.

    Attributes:
        calls: of bpf(2).
        updates, deletes: entries.
        misses: deletions (among `deletes`) of what was not there.
        masters: updates and deletions of a Service's own entry.
    """

    calls: int = 0
    updates: int = 0
    deletes: int = 0
    misses: int = 0
    masters: int = 0

    def __add__(self, other: "MapsWritten") -> "MapsWritten":
        """Both together."""
        return MapsWritten(
            self.calls + other.calls,
            self.updates + other.updates,
            self.deletes + other.deletes,
            self.misses + other.misses,
            self.masters + other.masters,
        )


class CiliumWriter:
    """Installs, changes and removes Services in one set of maps.

    Attributes:
        services: what is installed now.
    """

    def __init__(self, maps: CiliumMaps, *, batch: bool = False) -> None:
        """Write into maps that nobody else writes to.

        Args:
            maps: empty ones.
            batch: write by batches, all entries of a kind at once. No agent does that: it is there so that what watches
                writers meets it.
        """
        self._maps = maps.maps
        self._batch = batch
        sizes = {name: spec.value_size for name, spec in LAYOUTS[maps.version].items()}
        self._table = ServiceTable(CONTROLS[maps.version], sizes)
        self.services: list[ServiceSpec] = []

    def install(self, services: Sequence[ServiceSpec]) -> MapsWritten:
        """Write all of them, and remove what was there but is not among them."""
        wanted = {address for service in services for address in service.addresses}
        gone = [address for address in self._table.addresses if address not in wanted]
        writes = [write for address in gone for write in self._table.remove(address)]
        written = self._apply(writes)
        written += self._apply(write for service in services for write in self._update(service))
        self.services = list(services)
        return written

    def replace(self, index: int, after: ServiceSpec) -> MapsWritten:
        """Give one installed Service other endpoints."""
        before = self.services[index]
        gone = [address for address in before.addresses if address not in after.addresses]
        written = self._apply(
            [write for address in gone for write in self._table.remove(address)] + self._update(after)
        )
        self.services[index] = after
        return written

    def changing(self, changes: int, *, seed: int = 0) -> Iterator[MapsWritten]:
        """Change one endpoint of a random Service before each of `changes` steps of the caller's."""
        if not self.services:
            raise KptraceError("no Services are installed", remedy="install some before they are changed")
        chooser = random.Random(seed)
        for step in range(changes):
            index = chooser.randrange(len(self.services))
            yield self.replace(index, change_endpoint(self.services[index], step))

    def churn(self, changes: int, *, seed: int = 0) -> MapsWritten:
        """Change one endpoint of a random Service, `changes` times, one after the other."""
        return sum(self.changing(changes, seed=seed), MapsWritten())

    def remove(self) -> MapsWritten:
        """Take all Services away."""
        return self.install([])

    def _update(self, service: ServiceSpec) -> list[Write]:
        writes = []
        for address in service.addresses:
            flags = entries.LOADBALANCER if address == service.external else 0
            writes += self._table.update(address, service.endpoints, flags=flags)
        return writes

    def _apply(self, writes: Iterable[Write]) -> MapsWritten:
        if self._batch:
            return self._apply_batches(list(writes))
        calls = updates = misses = masters = 0
        for write in writes:
            calls += 1
            masters += write.phase is Phase.MASTER
            if write.value is None:
                misses += not self._maps[write.map].delete(write.key)
            else:
                updates += 1
                self._maps[write.map].update(write.key, write.value)
        return MapsWritten(calls, updates, calls - updates, misses, masters)

    def _apply_batches(self, writes: list[Write]) -> MapsWritten:
        # A batch of deletions ends at the first entry that is not there: those of affinity, which never are, are left out.
        writes = sorted((w for w in writes if w.phase is not Phase.AFFINITY), key=lambda write: write.phase)

        def kind(write: Write) -> tuple[MapName, bool]:
            return write.map, write.value is None

        calls = 0
        for (name, deletion), group in itertools.groupby(writes, kind):
            _batch(self._maps[name], list(group), deletion=deletion)
            calls += 1
        deletes = sum(write.value is None for write in writes)
        masters = sum(write.phase is Phase.MASTER for write in writes)
        return MapsWritten(calls, len(writes) - deletes, deletes, 0, masters)


def _batch(made: Map, writes: Sequence[Write], *, deletion: bool) -> None:
    """One BPF_MAP_UPDATE_BATCH or BPF_MAP_DELETE_BATCH."""
    keys = ctypes.create_string_buffer(b"".join(write.key for write in writes))
    values = ctypes.create_string_buffer(b"".join(write.value or b"" for write in writes))
    address = 0 if deletion else ctypes.addressof(values)
    attr = bytearray(_BATCH.pack(0, 0, ctypes.addressof(keys), address, len(writes), made.fd, 0, 0))
    bpf_inout(_DELETE_BATCH if deletion else _UPDATE_BATCH, attr)
    done = _BATCH.unpack(attr)[4]
    if done != len(writes):
        raise KptraceError(f"{made.spec.name}: {done} of {len(writes)} entries of a batch were written")
