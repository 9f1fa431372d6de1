# SPDX-License-Identifier: Apache-2.0
"""The way of a first packet, where the rules that lead on are not to be found."""

from typing import cast

from kptrace.dataplanes.nftables.dump import Interrupted
from kptrace.dataplanes.nftables.service_dump import ServiceDump
from kptrace.dataplanes.service_index import iptables_hashes
from kptrace.dataplanes.service_walk import find_walk
from kptrace.model.identity import Protocol, ServicePort
from kptrace.model.netfilter import DataPlane, IpFamily

WEB = ServicePort("demo", "web", "http", Protocol.TCP)
OWN = f"KUBE-SVC-{iptables_hashes(WEB)[0]}"


class Rules:
    """Chains of `nat` and where their rules lead; None for a chain that changes whenever it is read."""

    def __init__(self, **chains: list[str] | None) -> None:
        self._chains = {name.replace("_", "-"): targets for name, targets in chains.items()}

    def chains(self, _family: IpFamily) -> dict[str, set[str]]:
        """See `ServiceDump`."""
        return {"nat": set(self._chains)}

    def targets(self, _family: IpFamily, _table: str, chain: str) -> list[str]:
        """See `ServiceDump`."""
        found = self._chains[chain]
        if found is None:
            raise Interrupted("it changed")
        return found


def positions(services: list[str] | None) -> dict[str, int | None]:
    """Of each chain on the way, with these rules in KUBE-SERVICES."""
    rules = Rules(
        **{"PREROUTING": ["KUBE-SERVICES"], "KUBE_SERVICES": services, OWN.replace("-", "_"): ["KUBE-SEP-A"]}
    )
    walk = find_walk(cast(ServiceDump, rules), IpFamily.IPV4, WEB)
    assert walk is not None
    assert walk.dataplane is DataPlane.IPTABLES_NFT
    return {step.chain: step.position for step in walk.steps}


def test_the_rule_that_leads_on_has_its_turn() -> None:
    """The Service's own chain has none: chance chooses there."""
    assert positions(["KUBE-SVC-X", OWN]) == {"PREROUTING": 1, "KUBE-SERVICES": 2, OWN: 0}


def test_a_rule_that_is_not_found_has_no_position() -> None:
    """It was not written yet, or the chain never held still."""
    assert positions(["KUBE-SVC-X"])["KUBE-SERVICES"] is None
    assert positions(None)["KUBE-SERVICES"] is None
