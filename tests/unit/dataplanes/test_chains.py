# SPDX-License-Identifier: Apache-2.0
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kptrace.dataplanes.nftables.chains import any_nat, base_chains, dataplane_of, dormant_tables
from kptrace.model.netfilter import BaseChain, ChainType, DataPlane, Hook, IpFamily
from tests.unit.dataplanes import wire


def test_families_become_ip_families() -> None:
    """Chains of ip are IPv4's, of ip6 IPv6's, of inet both; arp, bridge and netdev have none."""
    dump = [wire.chain("t", f"c{family}", 1, family=family) for family in (1, 2, 3, 5, 7, 10)]
    assert [(c.family, c.chain) for c in base_chains(dump)] == [
        (IpFamily.IPV4, "c1"),
        (IpFamily.IPV4, "c2"),
        (IpFamily.IPV6, "c1"),
        (IpFamily.IPV6, "c10"),
    ]


def test_a_chain_is_decoded_whole() -> None:
    """Names, hook, signed priority and type are the kernel's."""
    (chain,) = base_chains([wire.chain("kube-proxy", "nat-output", 3, -50, "nat")])
    assert chain == BaseChain(
        IpFamily.IPV4, Hook.OUTPUT, -50, DataPlane.NFTABLES, "kube-proxy", "nat-output", ChainType.NAT
    )
    assert chain.effective_priority == -100


@pytest.mark.parametrize("nested", [0, 0x8000])
def test_the_hook_is_found_with_and_without_the_nested_flag(nested: int) -> None:
    """Kernels do not set NLA_F_NESTED on NFTA_CHAIN_HOOK, but may one day."""
    assert len(base_chains([wire.chain("t", "c", 0, nested=nested)])) == 1


def test_other_hooks_and_other_chains_are_left_out() -> None:
    """Inet ingress (hook 5) and chains without a hook are no base chains of an IP hook."""
    assert base_chains([wire.chain("t", "ingress", 5, family=1), wire.chain("t", "plain")]) == ()


def test_dormant_tables_have_no_chains_in_their_hooks() -> None:
    """A dormant table's chains are left out, the same name's of another family are not."""
    tables = [
        wire.nft(0, wire.name(1, "sleeps"), wire.number(2, 1), family=2),
        wire.nft(0, wire.name(1, "wakes"), wire.number(2, 0), family=2),
    ]
    dormant = dormant_tables(tables)
    assert dormant == {(2, "sleeps")}
    dump = [
        wire.chain("sleeps", "a", 1),
        wire.chain("wakes", "b", 1),
        wire.chain("sleeps", "c", 1, family=10),
    ]
    assert {c.chain for c in base_chains(dump, dormant)} == {"b", "c"}


@pytest.mark.parametrize(
    ("family", "table", "chain", "hook", "expected"),
    [
        (2, "nat", "OUTPUT", Hook.OUTPUT, DataPlane.IPTABLES_NFT),
        (10, "mangle", "FORWARD", Hook.FORWARD, DataPlane.IPTABLES_NFT),
        (1, "nat", "OUTPUT", Hook.OUTPUT, DataPlane.NFTABLES),
        (2, "nat", "OUTPUT", Hook.INPUT, DataPlane.NFTABLES),
        (2, "nat", "output", Hook.OUTPUT, DataPlane.NFTABLES),
        (2, "kube-proxy", "nat-output", Hook.OUTPUT, DataPlane.NFTABLES),
        (2, "mine", "OUTPUT", Hook.OUTPUT, DataPlane.NFTABLES),
    ],
)
def test_the_dataplane_is_told_by_names(
    family: int, table: str, chain: str, hook: Hook, expected: DataPlane
) -> None:
    """Only iptables' five tables with its built-in chains, in ip and ip6, are iptables-nft's."""
    assert dataplane_of(family, table, chain, hook) is expected


def test_nat_hooks_exist_in_the_family_of_a_nat_chain_only() -> None:
    """One NAT chain at any hook registers NAT's hooks of its family."""
    chains = base_chains([wire.chain("t", "c", 4, 100, "nat"), wire.chain("t", "d", 4, 100, family=10)])
    assert any_nat(chains, IpFamily.IPV4)
    assert not any_nat(chains, IpFamily.IPV6)


def test_ten_thousand_other_chains_cost_little() -> None:
    """A chain without a hook costs far less than a decoded one, in one run."""
    plain = [wire.chain("kube-proxy", f"service-ABCDEFGH-demo/web{n}/tcp/http") for n in range(10_000)]
    based = [wire.chain("kube-proxy", f"service-ABCDEFGH-demo/web{n}/tcp/http", 1, n) for n in range(10_000)]

    def cost(dump: list[bytes]) -> float:
        times = []
        for _ in range(5):
            begin = time.perf_counter()
            base_chains(dump)
            times.append(time.perf_counter() - begin)
        return sorted(times)[2]

    assert cost(plain) * 3 < cost(based)


@given(st.lists(st.binary(max_size=120)))
def test_any_bytes_decode_to_chains_or_nothing(tails: list[bytes]) -> None:
    """Whatever follows a message's header, nothing is raised."""
    base_chains([wire.nft(3) + tail + wire.attribute(4, wire.number(1, 0) + tail) for tail in tails])
    dormant_tables([wire.nft(0) + tail for tail in tails])
