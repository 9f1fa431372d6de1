# SPDX-License-Identifier: Apache-2.0
"""Writes rules into an embedded node as kube-proxy does: by the real tools, one run a sync. Measures nothing."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kptrace.experiments.netns import Namespace
from kptrace.experiments.rulesets import DATA_PLANES, Sync, change, install, nat_chain, remove
from kptrace.experiments.services import ServiceSpec, change_endpoint
from kptrace.model.errors import KptraceError, UsageError
from kptrace.model.netfilter import DataPlane, Hook, IpFamily


@dataclass(frozen=True, slots=True)
class Written:
    """What a writer did.

    Attributes:
        syncs: runs of the tool.
        commits: kernel transactions: iptables makes one for each table, nftables one a sync.
        nat_commits: those of them that change where Services lead to.
        size: bytes of input.
    """

    syncs: int = 0
    commits: int = 0
    nat_commits: int = 0
    size: int = 0

    def __add__(self, other: "Written") -> "Written":
        """Both together."""
        return Written(
            self.syncs + other.syncs,
            self.commits + other.commits,
            self.nat_commits + other.nat_commits,
            self.size + other.size,
        )


class RuleWriter:
    """Installs, changes and removes the rule set of one data plane and IP family in one namespace.

    Attributes:
        services: what is installed now.
    """

    def __init__(
        self,
        namespace: Namespace,
        dataplane: DataPlane,
        family: IpFamily = IpFamily.IPV4,
        *,
        counters: bool = True,
    ) -> None:
        """Nothing is installed yet.

        Args:
            namespace: where to write.
            dataplane: nftables, iptables-legacy or iptables-nft.
            family: of all Services.
            counters: let nftables count what walks the NAT chains, for `first_packets`.
        """
        if dataplane not in DATA_PLANES:
            raise UsageError(
                f"there are no rule sets for {dataplane}", remedy=f"choose from {', '.join(DATA_PLANES)}"
            )
        self._namespace = namespace
        self._dataplane = dataplane
        self._family = family
        self._counters = counters
        self.services: list[ServiceSpec] = []

    def _write(self, sync: Sync) -> Written:
        self._namespace.run(sync.argv, stdin=sync.text)
        nat = 1 if self._dataplane is DataPlane.NFTABLES else sync.text.count("*nat\n")
        return Written(1, sync.commits, nat, len(sync.text.encode()))

    def install(self, services: Sequence[ServiceSpec]) -> Written:
        """Write the full rule set."""
        written = Written()
        for sync in install(self._dataplane, self._family, services, counters=self._counters):
            written += self._write(sync)
        self.services = list(services)
        return written

    def replace(self, index: int, after: ServiceSpec) -> Written:
        """Give one installed Service other endpoints."""
        before = self.services[index]
        services = [*self.services]
        services[index] = after
        written = self._write(change(self._dataplane, services, before, after))
        self.services = services
        return written

    def changing(self, changes: int, *, seed: int = 0) -> Iterator[Written]:
        """Change one endpoint of a random Service before each of `changes` steps of the caller's."""
        if not self.services:
            raise KptraceError("no rules are installed", remedy="install some before they are changed")
        chooser = random.Random(seed)
        for step in range(changes):
            index = chooser.randrange(len(self.services))
            yield self.replace(index, change_endpoint(self.services[index], step))

    def churn(self, changes: int, *, seed: int = 0) -> Written:
        """Change one endpoint of a random Service, `changes` times, one after the other."""
        return sum(self.changing(changes, seed=seed), Written())

    def remove(self) -> Written:
        """Take all rules away."""
        self.services = []
        return self._write(remove(self._dataplane, self._family))

    def first_packets(self, hook: Hook) -> int:
        """How many packets the NAT chain at PREROUTING or OUTPUT has seen, by the rules' own counter.

        Raises:
            KptraceError: the chain has no counter.
        """
        table, chain = nat_chain(self._dataplane, hook)
        if self._dataplane is DataPlane.NFTABLES:
            ip = "ip" if self._family is IpFamily.IPV4 else "ip6"
            listed = self._namespace.run(["nft", "list", "chain", ip, table, chain])
            words = listed.split()
            if "counter" in words:
                return int(words[words.index("counter") + 2])
            raise KptraceError(f"{chain} has no counter", remedy="install the rules with counters")
        tool = "iptables" if self._family is IpFamily.IPV4 else "ip6tables"
        variant = "legacy" if self._dataplane is DataPlane.IPTABLES_LEGACY else "nft"
        argv = [f"{tool}-{variant}", "-w", "5", "-t", table, "-L", chain, "-v", "-x", "-n"]
        for line in self._namespace.run(argv).splitlines():
            if "KUBE-SERVICES" in line:
                return int(line.split()[0])
        raise KptraceError(f"{chain} does not lead to KUBE-SERVICES", remedy="install the rules first")
