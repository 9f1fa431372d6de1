# SPDX-License-Identifier: Apache-2.0
"""What is installed in one network namespace: base chains of nf_tables and legacy tables, others' links, queues."""

import errno
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from kptrace.dataplanes.iptables.legacy import legacy_chains, table_names
from kptrace.dataplanes.nftables.chains import base_chains, dormant_tables
from kptrace.dataplanes.nftables.netlink import NetlinkError, NftMessage
from kptrace.dataplanes.nftables.netlink_socket import NfnetlinkSocket
from kptrace.kernel.host import Host
from kptrace.kernel.links import netfilter_links
from kptrace.kernel.modules import loaded_module
from kptrace.kernel.netns import NetworkNamespace
from kptrace.model.netfilter import BaseChain, IpFamily

#: Shows the namespace of the thread that reads; the daemon's own /proc, which is not the host's where they differ.
_PROC_NET = Path("/proc/thread-self/net")
_QUEUE_WAITING_COLUMN = 2
_MODULE: Final = "nf_tables"
#: What a kernel says that has no nfnetlink, or has no nf_tables in it.
_ABSENT: Final = frozenset({errno.EPROTONOSUPPORT, errno.EINVAL})


class InstalledChains:
    """Reads the namespace afresh when asked, and tells cheaply whether that is worth while."""

    def __init__(self, netns: NetworkNamespace, host: Host = Host()) -> None:
        """Nothing is asked yet.

        Args:
            netns: the namespace.
            host: where sysfs is.
        """
        self._netns = netns
        self._host = host
        self._socket: NfnetlinkSocket | None = None
        self._absent = False
        self._closed = False
        self._seen: tuple[int, Mapping[IpFamily, frozenset[str]]] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def changed(self) -> bool:
        """Whether the ruleset's generation or the set of legacy tables moved since the last `read`."""
        return self._mark() != self._seen

    def acknowledge(self, generation: int) -> None:
        """The commit that made this generation touched no base chain: nothing is to be read again for it.

        Only for the very next generation; after a gap the next `changed` says so.
        """
        if self._seen is not None and generation == self._seen[0] + 1:
            self._seen = (generation, self._seen[1])

    def read(self) -> tuple[BaseChain, ...]:
        """All base chains of both kinds, sorted.

        Raises:
            NetlinkError: a dump was refused or never consistent.
        """
        mark = self._mark()
        chains: tuple[BaseChain, ...] = ()
        if mark[0] and self._socket is not None:
            dormant = dormant_tables(self._socket.dump(NftMessage.GETTABLE))
            chains = base_chains(self._socket.dump(NftMessage.GETCHAIN), dormant)
        # The mark is from before the dump: a commit in between is a change to look at again.
        self._seen = mark
        return (*chains, *legacy_chains(dict(mark[1])))

    def foreign(self, own: Iterable[tuple[int, int, int]]) -> dict[tuple[IpFamily, int], frozenset[int]]:
        """Priorities of netfilter links that are not `own` ones, each given as (nfproto, hook, priority).

        A link does not tell its namespace: another's may be counted here, which costs nothing but a priority.
        """
        mine = set(own)
        families = {family.nfproto: family for family in IpFamily}
        taken: dict[tuple[IpFamily, int], set[int]] = {}
        for link in netfilter_links():
            place = (link.nfproto, link.hook, link.priority)
            if place not in mine and link.nfproto in families:
                taken.setdefault((families[link.nfproto], link.hook), set()).add(link.priority)
        return {place: frozenset(priorities) for place, priorities in taken.items()}

    def queues(self) -> int | None:
        """Packets that wait in the namespace's NFQUEUEs; None where it has no queue."""
        with self._netns.enter():
            try:
                lines = (_PROC_NET / "netfilter/nfnetlink_queue").read_text().splitlines()
            except FileNotFoundError:
                return None
        return sum(int(line.split()[_QUEUE_WAITING_COLUMN]) for line in lines) if lines else None

    def _mark(self) -> tuple[int, Mapping[IpFamily, frozenset[str]]]:
        generation = self._generation()
        with self._netns.enter():
            return generation, table_names(_PROC_NET)

    def _generation(self) -> int:
        """The ruleset's generation, which is never 0; 0 while there is no nf_tables.

        Asking has a kernel without nf_tables run modprobe: so where that gave nothing, only once the module has come.
        """
        if self._closed or (self._absent and loaded_module(self._host, _MODULE) is None):
            return 0
        try:
            if self._socket is None:
                with self._netns.enter():
                    self._socket = NfnetlinkSocket.open()
            generation = self._socket.generation()
        except NetlinkError as error:
            if error.errno not in _ABSENT:
                raise
            self._absent = True
            return 0
        self._absent = False
        return generation

    def close(self) -> None:
        """Close the socket; there are no chains of nf_tables from then on. Idempotent."""
        self._closed = True
        if self._socket is not None:
            self._socket.close()
            self._socket = None
