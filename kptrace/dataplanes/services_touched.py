# SPDX-License-Identifier: Apache-2.0
"""The Service ports that a transaction's own bytes name, whatever the data plane. Pure."""

from collections import defaultdict
from typing import Final

from kptrace.dataplanes.iptables.services import chains_told
from kptrace.dataplanes.iptables.services import touched_service_ports as touched_by_chains
from kptrace.dataplanes.nftables.batch import decode_batch
from kptrace.dataplanes.nftables.services import decode_services, touched_service_ports
from kptrace.dataplanes.service_index import ServiceIndex
from kptrace.dataplanes.told import EVERYTHING, Touched
from kptrace.model.identity import ServiceAddress, ServicePort, Snapshot
from kptrace.model.netfilter import DataPlane

_NAMING: Final = (DataPlane.NFTABLES, DataPlane.IPTABLES_NFT)


def index_of(snapshot: Snapshot) -> ServiceIndex:
    """All Service ports of a snapshot: some milliseconds for a thousand."""
    addresses: defaultdict[ServicePort, list[ServiceAddress]] = defaultdict(list)
    for address, port in snapshot.services.items():
        addresses[port].append(address)
    node_ports = {port: number for (number, _), port in snapshot.node_ports.items()}
    index = ServiceIndex()
    for port in {**addresses, **node_ports}:
        index.add(port, addresses[port], node_ports.get(port, 0))
    return index


def services_touched(dataplane: DataPlane, data: bytes, size: int, index: ServiceIndex) -> Touched:
    """Which Service ports a committed batch writes; everything where its bytes do not tell.

    Args:
        dataplane: whose batch it is; a legacy table's replacement names nothing.
        data: the copy of the batch.
        size: bytes of the whole batch.
        index: the Service ports that there are.
    """
    if dataplane not in _NAMING:
        return EVERYTHING
    found: set[ServicePort] = set()
    told: list[Touched] = [touched_service_ports(batch, index) for batch in decode_services(data, size)]
    told += [touched_by_chains(batch, index) for batch in chains_told(decode_batch(data, size))]
    for ports in told:
        if ports is EVERYTHING:
            return EVERYTHING
        found |= ports
    return frozenset(found)
