# SPDX-License-Identifier: Apache-2.0
"""Service ports in iptables-nft's batches, by the hashes in chain names."""

from dataclasses import dataclass

from kptrace.dataplanes.iptables.services import (
    ChainsTold,
    chains_told,
    endpoint_chains,
    touched_service_ports,
)
from kptrace.dataplanes.nftables.batch import decode_batch
from kptrace.dataplanes.service_index import ServiceIndex, iptables_hashes
from kptrace.dataplanes.told import EVERYTHING, NOTHING_TOLD, Names
from kptrace.model.identity import Protocol, ServicePort
from kptrace.model.netfilter import IpFamily
from tests.unit.dataplanes.captured import captured

WEB = ServicePort("demo", "web", "http", Protocol.TCP)
API = ServicePort("demo", "api", "https", Protocol.TCP)
SVC, SEP = "KUBE-SVC-XRY76EGRC3BSCIIJ", "KUBE-SEP-4R67FX26EEAQJQLI"


@dataclass(frozen=True)
class Chains:
    """A decoded batch, as far as it is looked at."""

    touched_chains: frozenset[tuple[str, str, str]]
    deleted_chains: frozenset[tuple[str, str, str]] = frozenset()
    truncated: bool = False


def told(*touched: str, deleted: tuple[str, ...] = (), truncated: bool = False) -> ChainsTold:
    """What these chains of the table nat tell."""
    here = [
        frozenset(("ipv4", "nat", chain) for chain in chains) for chains in ((*touched, *deleted), deleted)
    ]
    (found,) = chains_told(Chains(*here, truncated))
    return found


def index_of(*ports: ServicePort) -> ServiceIndex:
    """An index of Service ports without addresses."""
    index = ServiceIndex()
    for port in ports:
        index.add(port)
    return index


def test_what_iptables_nft_restore_sends_for_one_endpoint() -> None:
    """The Service port's chain, and that of the endpoint: the hashes are those that kube-proxy was seen to make."""
    (found,) = chains_told(decode_batch(captured("iptables_nft_endpoints")))
    assert found.family is IpFamily.IPV4
    assert found.whole
    assert touched_service_ports(found, index_of(WEB, API)) == {WEB}
    assert touched_service_ports(found, ServiceIndex()) == frozenset()
    assert found.touches(WEB, bare=False)
    assert found.present(WEB)
    assert found.endpoint(WEB, "10.244.1.11", 8080)
    assert found.endpoint(WEB, "10.244.2.12", 8080) is False
    assert found.endpoint(API, "10.244.2.12", 8080) is None
    assert found.address(WEB, "10.96.10.1", 80) is None
    assert found.present(API) is None


def test_a_service_port_without_endpoints_leaves_no_chain_to_see() -> None:
    """Only KUBE-SERVICES could tell; one with endpoints that is not touched did not change."""
    found = told("KUBE-SERVICES")
    assert found.touches(WEB, bare=True) is None
    assert found.touches(WEB, bare=False) is False
    assert told("KUBE-FORWARD").touches(WEB, bare=True) is False


def test_a_deleted_endpoint_is_gone() -> None:
    """Where there are few endpoints, chains that are left over are deleted in the same batch."""
    found = told("KUBE-SERVICES", deleted=(SVC, SEP))
    assert found.touches(WEB, bare=True)
    assert found.endpoint(WEB, "10.244.1.11", 8080) is False
    assert found.present(WEB) is None
    assert touched_service_ports(found, index_of(WEB)) == {WEB}


def test_a_cut_copy_may_carry_anything() -> None:
    """Nothing is ruled out; a chain that is written may be deleted in what is not there, but it is one that was or is."""
    found = told("KUBE-SERVICES", SVC, SEP, truncated=True)
    assert touched_service_ports(found, index_of(WEB)) is EVERYTHING
    assert found.touches(API, bare=False) is None
    assert found.endpoint(WEB, "10.244.1.11", 8080) is None
    assert found.mentions(WEB, "10.244.1.11", 8080)
    assert not found.mentions(WEB, "10.244.1.12", 8080)
    assert found.present(WEB) is None
    assert found.endpoint(WEB, "10.244.1.12", 8080) is None


def test_what_iptables_nft_restore_sends_for_the_last_endpoint() -> None:
    """The chains are flushed and deleted; KUBE-SERVICES stays."""
    (found,) = chains_told(decode_batch(captured("iptables_nft_last_endpoint")))
    assert found == told("KUBE-SERVICES", deleted=(SVC, SEP))


def test_other_tables_and_other_chains_tell_nothing() -> None:
    """The filter batch of the same sync; somebody else's chains."""
    assert (
        chains_told(Chains(frozenset({("ipv4", "filter", "KUBE-SERVICES"), ("ipv4", "nat", "DOCKER")}))) == ()
    )


def test_hashes_of_ports_without_a_name_and_of_ipv6_endpoints() -> None:
    """A number may be a name or stand for none; an IPv6 address has brackets."""
    unnamed = ServicePort("default", "kubernetes", "443", Protocol.TCP)
    assert len(set(iptables_hashes(unnamed))) == 2
    assert iptables_hashes(WEB) == ("XRY76EGRC3BSCIIJ",)
    assert endpoint_chains(WEB, "10.244.1.11", 8080) == {SEP}
    assert len(endpoint_chains(unnamed, "fd00::1", 6443)) == 2


def test_names_alone_tell_what_was_touched() -> None:
    """A set of Service ports, or everything."""
    names = Names(frozenset({WEB}))
    assert names.touches(WEB, bare=False)
    assert names.touches(API, bare=False) is False
    assert NOTHING_TOLD.touches(API, bare=False) is None
    assert (names.endpoint(WEB, "", 1), names.present(WEB), names.address(WEB, "", 1)) == (None, None, None)
