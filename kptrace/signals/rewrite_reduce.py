# SPDX-License-Identifier: Apache-2.0
"""From a record to a `Rewrite`: what it changed, how it ended, who wrote it. Follows committed batches on the way."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, Protocol

from kptrace.dataplanes.iptables.legacy import decode_replace
from kptrace.dataplanes.nftables.batch import Batch, decode_batch
from kptrace.model.netfilter import DataPlane, IpFamily
from kptrace.model.rewrite import ObjectCount, Outcome, ProcessRun, Rewrite
from kptrace.signals.processes import ProcessTable
from kptrace.signals.rewrite_labels import NFPROTOS, dataplane, family_and_table
from kptrace.signals.rewrite_outcome import batch_outcome, replace_outcome
from kptrace.signals.rewrite_records import Flag, Kind, Transaction
from kptrace.signals.writers import Writers

#: Key in `Rewrite.details`: present where base chains may have come or gone.
BASE_CHAINS: Final = "base_chains"


class Installed(Protocol):
    """What is known of the installed rules (`rewrite_objects.RulesetObjects`)."""

    def base_chains(self, nfproto: int, table: str) -> frozenset[str] | None:
        """Names of a table's base chains; None if the table is unknown."""
        ...

    def committed(self, transaction: Transaction, *, whole: bool) -> None:
        """Follow a committed batch."""
        ...

    def replaced(self, family: IpFamily, table: str, entries: int) -> None:
        """Follow a legacy table's replacement."""
        ...

    def doubt(self) -> None:
        """Something may have been committed that cannot be followed."""
        ...


@dataclass(frozen=True, slots=True)
class Reducer:
    """Makes rewrites of records from the watched namespace.

    Attributes:
        watched: inode of the watched network namespace.
        exact_sequence: whether records carry the generation itself.
        installed: what is known of the installed rules; told of what was committed.
        processes: who runs.
        writers: the classes.
        cgroup: path of a process's cgroup.
    """

    watched: int
    exact_sequence: bool
    installed: Installed
    processes: ProcessTable
    writers: Writers
    cgroup: Callable[[ProcessRun], str]

    def rewrite(self, record: Transaction) -> Rewrite | None:
        """The rewrite that a record tells of; None if it cannot be understood."""
        return self._batch(record) if record.is_batch else self._replacement(record)

    def writer(self, tgid: int) -> str:
        """The class of a process in the watched namespace."""
        return self.writers.classify(self.processes.chain(tgid), watched_netns=True, cgroup=self.cgroup)

    def _batch(self, record: Transaction) -> Rewrite:
        batch = decode_batch(record.data, record.size, record.tail)
        outcome = batch_outcome(record, batch.kind, exact_sequence=self.exact_sequence)
        whole = not batch.truncated and not record.flags & (Flag.SEVERAL | Flag.UNREAD)
        # Both before the batch is followed, which may take the table away.
        planes = {self._plane(family, table, batch) for family, table in batch.tables}
        base = not whole or self._touches_base(batch)
        if outcome is Outcome.COMMITTED:
            self.installed.committed(record, whole=whole)
        elif outcome is Outcome.UNKNOWN:
            self.installed.doubt()
        plane = DataPlane.NFTABLES if not planes else planes.pop() if len(planes) == 1 else DataPlane.OTHER
        return self._make(
            record,
            plane,
            family_and_table(batch.tables),
            outcome,
            batch.objects,
            truncated=not whole,
            touched=sorted(chain for _, _, chain in batch.touched_chains),
            base=base,
        )

    def _plane(self, family: str, table: str, batch: Batch) -> DataPlane:
        nfproto = NFPROTOS.get(family, 0)
        return dataplane(nfproto, table, self.installed.base_chains(nfproto, table) or ())

    def _touches_base(self, batch: Batch) -> bool:
        def may_be_base(family: str, table: str, chain: str) -> bool:
            known = self.installed.base_chains(NFPROTOS.get(family, 0), table)
            return known is None or chain in known

        return batch.base_chain_touched or any(may_be_base(*chain) for chain in batch.deleted_chains)

    def _replacement(self, record: Transaction) -> Rewrite | None:
        header = decode_replace(record.data)
        if header is None:
            return None
        family = IpFamily.IPV4 if record.kind is Kind.REPLACE4 else IpFamily.IPV6
        outcome = replace_outcome(record)
        if outcome is Outcome.COMMITTED:
            self.installed.replaced(family, header.table, header.entries)
        return self._make(
            record,
            DataPlane.IPTABLES_LEGACY,
            (family.value, header.table),
            outcome,
            (ObjectCount(family.value, header.table, "entry", "replace", header.entries),),
        )

    def _make(
        self,
        record: Transaction,
        plane: DataPlane,
        place: tuple[str, str],
        outcome: Outcome,
        objects: tuple[ObjectCount, ...],
        *,
        truncated: bool = False,
        touched: Iterable[str] = (),
        base: bool = False,
    ) -> Rewrite:
        chain = self.processes.chain(record.tgid, record.parents)
        own = bool(chain) and chain[0].tgid == record.tgid
        return Rewrite(
            dataplane=plane,
            family=place[0],
            table=place[1],
            writer=self.writers.classify(
                chain, watched_netns=record.task_netns == self.watched, cgroup=self.cgroup, touched=touched
            ),
            run=chain[0] if own else ProcessRun(record.tgid, comm=record.comm, cgroup_id=record.cgroup_id),
            begin_ns=record.begin_ns,
            end_ns=record.end_ns,
            size=record.size,
            outcome=outcome,
            truncated=truncated,
            objects=objects,
            netns=record.netns,
            generation=record.sequence_end if record.is_batch and self.exact_sequence else 0,
            details={BASE_CHAINS: "may_have_changed"} if base else {},
        )
