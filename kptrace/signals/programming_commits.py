# SPDX-License-Identifier: Apache-2.0
"""From a rewrite and its bytes to commits, one for each IP family that it may have programmed. Pure."""

from dataclasses import replace
from typing import Final

from kptrace.dataplanes.iptables.services import TABLE as NAT
from kptrace.dataplanes.iptables.services import chains_told
from kptrace.dataplanes.nftables.batch import decode_batch
from kptrace.dataplanes.nftables.service_names import TABLE as KUBE_PROXY_TABLE
from kptrace.dataplanes.nftables.services import decode_services
from kptrace.dataplanes.told import NOTHING_TOLD, Told
from kptrace.model.netfilter import DataPlane, IpFamily
from kptrace.model.rewrite import Outcome, Rewrite
from kptrace.signals.programming_events import Commit

_TABLES: Final = {
    DataPlane.NFTABLES: KUBE_PROXY_TABLE,
    DataPlane.IPTABLES_NFT: NAT,
    DataPlane.IPTABLES_LEGACY: NAT,
}


def commits_of(rewrite: Rewrite, data: bytes, run_begin_ns: int | None) -> tuple[Commit, ...]:
    """What the correlator needs of a rewrite: none where it is of a table that no Service is in.

    Args:
        rewrite: as reduced.
        data: the copy of the writer's buffer.
        run_begin_ns: when the run of its writer began (`SyncReducer.began_ns`); None if unknown.
    """
    if rewrite.dataplane not in _TABLES:
        return ()
    begin = min(rewrite.begin_ns, rewrite.begin_ns if run_begin_ns is None else run_begin_ns)
    return tuple(
        Commit(
            rewrite.dataplane,
            family,
            rewrite.writer,
            rewrite.outcome,
            rewrite.begin_ns,
            rewrite.end_ns,
            begin,
            told,
        )
        for family, told in _told(rewrite, data).items()
    )


def failed_run(dataplane: str, family: str, writer: str, begin_ns: int, end_ns: int) -> Commit | None:
    """A writer's run that failed, whether it came to a transaction or not; None for one of no known family."""
    if dataplane not in set(_TABLES) or family not in set(IpFamily):
        return None
    return Commit(
        DataPlane(dataplane),
        IpFamily(family),
        writer,
        Outcome.FAILED,
        end_ns,
        end_ns,
        begin_ns,
        NOTHING_TOLD,
    )


def _told(rewrite: Rewrite, data: bytes) -> dict[IpFamily, Told]:
    if rewrite.dataplane is DataPlane.NFTABLES:
        nft = decode_services(data, rewrite.size)
        found: dict[IpFamily, Told] = {
            told.family: replace(told, truncated=told.truncated or rewrite.truncated) for told in nft
        }
    elif rewrite.dataplane is DataPlane.IPTABLES_NFT:
        chains = chains_told(decode_batch(data, rewrite.size))
        found = {told.family: replace(told, truncated=told.truncated or rewrite.truncated) for told in chains}
    else:
        found = {}
    table = rewrite.table == _TABLES[rewrite.dataplane]
    silent = rewrite.dataplane is DataPlane.IPTABLES_LEGACY or rewrite.truncated
    if not found and table and silent and rewrite.family in set(IpFamily):
        found = {IpFamily(rewrite.family): NOTHING_TOLD}
    return found
