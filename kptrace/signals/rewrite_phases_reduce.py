# SPDX-License-Identifier: Apache-2.0
"""From the runs of the kernel's functions to durations by data plane and phase. No I/O."""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from threading import Lock
from typing import Final

from kptrace.dataplanes.nftables.batch import decode_batch
from kptrace.model.metrics import MetricFamily, MetricSpec
from kptrace.model.netfilter import DataPlane
from kptrace.signals.durations import Histogram
from kptrace.signals.rewrite_labels import NFPROTOS, dataplane
from kptrace.signals.rewrite_phases_records import Flag, Kind, Phases

PHASE: Final = MetricSpec(
    "kptrace_rewrite_phase_duration_seconds",
    "histogram",
    "Duration of a rewrite's phases, in the watched namespace. Of an nfnetlink batch: parse (nfnetlink_rcv_batch without"
    " the next two), commit (nf_tables_commit), abort (nf_tables_abort: a failed batch, a dry run, one that is tried again);"
    " later destroy (nf_tables_trans_destroy_work, in a worker) and teardown (nft_rcv_nl_event, in the close of the"
    " sender's socket, which waits for the worker). Of a legacy table: parse (do_ipt_set_ctl or do_ip6t_set_ctl up to the"
    " replacement), replace (xt_replace_table), counters (the rest: counters copied, old rules let go). Mechanism fentry or"
    " kprobe.",
    ("dataplane", "phase"),
)
SPECS: Final = (PHASE,)

#: Sockets whose batches were seen, until they are closed.
MAX_SENDERS: Final = 1024

_Phase = tuple[str, int]


class PhaseCounts:
    """Everything that is counted of the phases. `families` may be asked on any thread."""

    def __init__(self) -> None:
        """Count nothing yet."""
        self.unpaired = 0
        self._lock = Lock()
        self._durations: dict[tuple[str, str], Histogram] = {}
        self._senders: OrderedDict[int, DataPlane] = OrderedDict()
        self._to_destroy: set[DataPlane] = set()

    def apply(self, record: Phases) -> None:
        """Count a run."""
        plane, phases = self._read(record)
        if not phases:
            self.unpaired += 1
        with self._lock:
            for phase, duration in phases:
                self._durations.setdefault((plane.value, phase), Histogram()).add(duration)

    def _read(self, record: Phases) -> tuple[DataPlane, list[_Phase]]:
        if record.kind is Kind.REPLACE:
            return DataPlane.IPTABLES_LEGACY, list(_of_replacement(record))
        if record.kind is Kind.BATCH:
            plane = plane_of(record)
            self._remember(record, plane)
            return plane, list(_of_batch(record))
        if record.kind is Kind.TEARDOWN:
            return self._senders.pop(record.portid, DataPlane.OTHER), [("teardown", record.total_ns)]
        # One run takes out what all commits before it left.
        planes, self._to_destroy = self._to_destroy, set()
        return planes.pop() if len(planes) == 1 else DataPlane.OTHER, [("destroy", record.total_ns)]

    def _remember(self, record: Phases, plane: DataPlane) -> None:
        if record.flags & Flag.COMMITTED:
            self._to_destroy.add(plane)
        self._senders[record.portid] = plane
        self._senders.move_to_end(record.portid)
        while len(self._senders) > MAX_SENDERS:
            self._senders.popitem(last=False)

    def families(self) -> Iterable[MetricFamily]:
        """The present values."""
        with self._lock:
            samples = [each.sample(labels) for labels, each in sorted(self._durations.items())]
        return [MetricFamily(PHASE, samples)]


def plane_of(record: Phases) -> DataPlane:
    """Whose table a batch is about, as far as its first bytes name one."""
    tables = decode_batch(record.head, record.size, b"").tables
    planes = {dataplane(NFPROTOS.get(family, 0), table, ()) for family, table in tables}
    return planes.pop() if len(planes) == 1 else DataPlane.OTHER if planes else DataPlane.NFTABLES


def _of_batch(record: Phases) -> Iterator[_Phase]:
    if not record.flags & (Flag.COMMITTED | Flag.ABORTED) and not record.inner_ns:
        return  # neither was seen: nf_tables was only being loaded
    yield "parse", max(0, record.total_ns - record.inner_ns - record.abort_ns)
    if record.inner_ns:
        yield "commit", record.inner_ns
    if record.flags & Flag.ABORTED:
        yield "abort", record.abort_ns


def _of_replacement(record: Phases) -> Iterator[_Phase]:
    if record.flags & Flag.REFUSED:
        yield "parse", record.total_ns
    elif record.flags & Flag.REPLACED:
        yield "parse", record.mark_ns - record.begin_ns
        yield "replace", record.inner_ns
        yield "counters", max(0, record.end_ns - record.mark_ns - record.inner_ns)
