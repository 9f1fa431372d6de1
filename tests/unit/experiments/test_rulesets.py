# SPDX-License-Identifier: Apache-2.0

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kptrace.experiments import rules_iptables, rules_nftables, rulesets
from kptrace.experiments.chain_names import (
    iptables_endpoint_chain,
    iptables_external_chain,
    iptables_service_chain,
    nftables_service_chain,
)
from kptrace.experiments.services import ServiceSpec, change_endpoint, make_services
from kptrace.model.identity import Endpoint, Protocol, ServiceAddress, ServicePort
from kptrace.model.netfilter import DataPlane, Hook, IpFamily

SETS = st.builds(
    make_services,
    st.integers(1, 40),
    st.integers(0, 4),
    family=st.sampled_from(IpFamily),
    protocol=st.sampled_from([Protocol.TCP, Protocol.UDP]),
    external_every=st.integers(0, 3),
)
WEB = ServiceSpec(
    ServicePort("demo", "web", "http", Protocol.TCP),
    ServiceAddress("10.96.10.1", 80, Protocol.TCP),
    tuple(Endpoint(ip, 8080) for ip in ("10.244.1.11", "10.244.2.12", "10.244.2.13")),
)

BALANCED = ServiceSpec(
    ServicePort("probe", "web-00000", "http", Protocol.TCP),
    ServiceAddress("10.96.1.1", 80, Protocol.TCP),
    tuple(Endpoint(ip, 8080) for ip in ("10.244.0.2", "10.246.0.0")),
    ServiceAddress("10.97.0.1", 80, Protocol.TCP),
)


def iptables_tables(text: str) -> dict[str, list[str]]:
    """An iptables-restore input by table."""
    tables: dict[str, list[str]] = {}
    current: list[str] = []
    for line in text.splitlines():
        if line.startswith("*"):
            current = tables[line[1:]] = []
        elif line != "COMMIT":
            current.append(line)
    return tables


def test_one_endpoint_change_is_the_transaction_that_kube_proxy_wrote() -> None:
    """The nftables partial sync of demo/web:http is, byte by byte, what the real kube-proxy piped into nft."""
    before = ServiceSpec(WEB.port, WEB.address, WEB.endpoints[:2])
    assert rules_nftables.change(before, WEB) == (
        "add chain ip kube-proxy service-AXK6CI2C-demo/web/tcp/http\n"
        "flush chain ip kube-proxy service-AXK6CI2C-demo/web/tcp/http\n"
        "add rule ip kube-proxy service-AXK6CI2C-demo/web/tcp/http meta l4proto tcp dnat ip addr . port to numgen "
        "random mod 3 map { 0 : 10.244.1.11 . 8080 , 1 : 10.244.2.12 . 8080 , 2 : 10.244.2.13 . 8080 }\n"
    )


def test_one_change_of_a_balanced_service_is_the_transaction_that_kube_proxy_wrote() -> None:
    """With an external address the nftables partial sync has its chain too: as kube-proxy 1.36 wrote it."""
    chains = [f"{kind}-3YSYHHIQ-probe/web-00000/tcp/http" for kind in ("service", "external")]
    rules = [
        f'{chains[1]} mark set mark or 0x00004000 comment "masquerade"',
        f"{chains[1]} goto {chains[0]}",
        f"{chains[0]} meta l4proto tcp dnat ip addr . port to numgen random mod 2 map "
        "{ 0 : 10.244.0.2 . 8080 , 1 : 10.246.0.0 . 8080 }",
    ]
    assert rules_nftables.change(BALANCED, BALANCED).splitlines() == [
        *(f"{verb} chain ip kube-proxy {chain}" for chain in chains for verb in ("add", "flush")),
        *(f"add rule ip kube-proxy {rule}" for rule in rules),
    ]


def test_an_external_address_has_the_iptables_rules_that_kube_proxy_wrote() -> None:
    """The rules that lead from KUBE-SERVICES to the Service are those that kube-proxy 1.36 wrote, in their order."""
    nat = iptables_tables(rules_iptables.change([BALANCED], BALANCED, BALANCED))["nat"]
    assert [line for line in nat if "TCZQ6L7JF37WIBMN" in line and "-> " not in line] == [
        ":KUBE-EXT-TCZQ6L7JF37WIBMN - [0:0]",
        ":KUBE-SVC-TCZQ6L7JF37WIBMN - [0:0]",
        '-A KUBE-SERVICES -m comment --comment "probe/web-00000:http cluster IP" -m tcp -p tcp -d 10.96.1.1 '
        "--dport 80 -j KUBE-SVC-TCZQ6L7JF37WIBMN",
        '-A KUBE-SERVICES -m comment --comment "probe/web-00000:http loadbalancer IP" -m tcp -p tcp -d 10.97.0.1 '
        "--dport 80 -j KUBE-EXT-TCZQ6L7JF37WIBMN",
        '-A KUBE-SVC-TCZQ6L7JF37WIBMN -m comment --comment "probe/web-00000:http cluster IP" -m tcp -p tcp '
        "-d 10.96.1.1 --dport 80 ! -s 10.240.0.0/12 -j KUBE-MARK-MASQ",
        '-A KUBE-EXT-TCZQ6L7JF37WIBMN -m comment --comment "masquerade traffic for probe/web-00000:http external '
        'destinations" -j KUBE-MARK-MASQ',
        "-A KUBE-EXT-TCZQ6L7JF37WIBMN -j KUBE-SVC-TCZQ6L7JF37WIBMN",
    ]


def test_a_balanced_service_without_endpoints_is_rejected_at_both_addresses() -> None:
    """The external address is rejected in a chain of its own, and the external chain is dropped, as kube-proxy does."""
    empty = replace(BALANCED, endpoints=())
    tables = iptables_tables(rules_iptables.change([empty], BALANCED, empty))
    assert [line for line in tables["filter"] if "has no endpoints" in line] == [
        '-A KUBE-SERVICES -m comment --comment "probe/web-00000:http has no endpoints" -m tcp -p tcp -d 10.96.1.1 '
        "--dport 80 -j REJECT",
        '-A KUBE-EXTERNAL-SERVICES -m comment --comment "probe/web-00000:http has no endpoints" -m tcp -p tcp '
        "-d 10.97.0.1 --dport 80 -j REJECT",
    ]
    assert "-X KUBE-EXT-TCZQ6L7JF37WIBMN" in tables["nat"]
    text = rules_nftables.change(BALANCED, empty)
    assert [line.split(" { ")[1] for line in text.splitlines() if "no-endpoint-services" in line] == [
        f'{ip} . tcp . 80 comment "probe/web-00000:http" : goto reject-chain }}'
        for ip in ("10.96.1.1", "10.97.0.1")
    ]


@given(SETS)
def test_nftables_has_one_chain_and_one_element_for_each_service(services: tuple[ServiceSpec, ...]) -> None:
    """A Service has a chain with one rule if it has endpoints, and elements that lead its addresses there or to a reject."""
    lines = rules_nftables.full(services[0].family, services).splitlines()
    ip = "ip" if services[0].family is IpFamily.IPV4 else "ip6"
    for service in services:
        chain = f"{ip} kube-proxy {nftables_service_chain(service)}"
        assert lines.count(f"add chain {chain}") == bool(service.endpoints)
        assert sum(line.startswith(f"add rule {chain} ") for line in lines) == bool(service.endpoints)
        for address in service.addresses:
            elements = [line for line in lines if f" {address.ip} . " in line and "element" in line]
            (element,) = elements
            assert ("service-ips" in element) == bool(service.endpoints)
    assert all(f" {ip} kube-proxy" in line for line in lines)


@given(SETS, st.data())
def test_nftables_moves_the_element_only_when_the_first_endpoint_comes_or_the_last_goes(
    services: tuple[ServiceSpec, ...], data: st.DataObject
) -> None:
    """A change between endpoints leaves the maps alone; one from or to none moves the Service's elements."""
    service = data.draw(st.sampled_from(services))
    changed = change_endpoint(service, 1)
    text = rules_nftables.change(service, changed)
    assert ("delete element" in text) == (not service.endpoints)
    outside = 4 if service.external else 0  # a chain, emptied, and its two rules
    moved = 0 if service.endpoints else 2 * len(service.addresses)
    assert text.count("\n") == 3 + outside + moved


@given(SETS)
def test_iptables_defines_every_chain_that_it_leads_to(services: tuple[ServiceSpec, ...]) -> None:
    """Every target of an iptables rule is a chain declared in that table, or a built-in target."""
    tables = iptables_tables(rules_iptables.full(services[0].family, services))
    for lines in tables.values():
        declared = {line[1:].split()[0] for line in lines if line.startswith(":")}
        used = {match[1] for line in lines if (match := re.search(r" -j (KUBE-\S+)", line))}
        assert used <= declared
        assert all(len(chain) <= 28 for chain in declared)
        assert all(line.split()[1] in declared for line in lines if line.startswith("-A"))


@given(SETS)
def test_iptables_dispatches_each_service_with_endpoints_once(services: tuple[ServiceSpec, ...]) -> None:
    """KUBE-SERVICES in nat has one rule for each address of a Service with endpoints and ends with the node ports' jump."""
    tables = iptables_tables(rules_iptables.full(services[0].family, services))
    dispatch = [line for line in tables["nat"] if line.startswith("-A KUBE-SERVICES ")]
    backed = [service for service in services if service.endpoints]
    targets = [
        chain
        for service in backed
        for chain in (
            iptables_service_chain(service),
            *([iptables_external_chain(service)] if service.external else []),
        )
    ]
    assert [line.rsplit(" ", 1)[1] for line in dispatch] == [*targets, "KUBE-NODEPORTS"]
    rejected = [line for line in tables["filter"] if "has no endpoints" in line]
    assert len(rejected) == sum(len(s.addresses) for s in services if not s.endpoints)
    assert sum("-j DNAT" in line for line in tables["nat"]) == sum(len(s.endpoints) for s in services)


def test_iptables_probabilities_give_each_endpoint_the_same_share() -> None:
    """Of three endpoints the first gets a third, the second half of the rest, the last what is left."""
    chain = iptables_service_chain(WEB)
    rules = [
        line
        for line in rules_iptables.full(IpFamily.IPV4, [WEB]).splitlines()
        if line.startswith(f"-A {chain}")
    ]
    found = re.findall(r"--probability (\S+)", "\n".join(rules))
    assert found == ["0.3333333333", "0.5000000000"]
    assert rules[-1].endswith(iptables_endpoint_chain(WEB, WEB.endpoints[2]))


@pytest.mark.parametrize(("count", "commented"), [(500, True), (501, False)])
def test_a_large_cluster_loses_the_endpoints_comments(count: int, commented: bool) -> None:
    """Above 1,000 endpoints the comments with endpoints are gone, those with the cluster IP stay."""
    text = rules_iptables.full(IpFamily.IPV4, make_services(count))
    assert (" -> " in text) is commented
    assert text.count("cluster IP") == 2 * count


def test_an_iptables_change_dispatches_all_services_and_writes_one() -> None:
    """A partial sync has every dispatch rule, only the changed Service's chains, and drops the stale one."""
    services = list(make_services(10))
    before, after = services[3], change_endpoint(services[3], 7)
    services[3] = after
    nat = iptables_tables(rules_iptables.change(services, before, after))["nat"]
    assert sum("cluster IP" in line and line.startswith("-A KUBE-SERVICES") for line in nat) == 10
    assert [line for line in nat if line.startswith(":KUBE-SVC")] == [
        f":{iptables_service_chain(after)} - [0:0]"
    ]
    stale = iptables_endpoint_chain(before, before.endpoints[0])
    assert [line for line in nat if line.startswith("-X")] == [f"-X {stale}"]
    assert not any(line.startswith(f"-A {stale}") for line in nat)


def test_a_service_that_loses_its_last_endpoint_loses_its_chain() -> None:
    """Without endpoints the Service's chains are deleted and its address is rejected in filter."""
    services = list(make_services(2))
    before = services[0]
    services[0] = after = ServiceSpec(before.port, before.address, ())
    tables = iptables_tables(rules_iptables.change(services, before, after))
    assert f"-X {iptables_service_chain(before)}" in tables["nat"]
    assert any("has no endpoints" in line for line in tables["filter"])


@pytest.mark.parametrize(
    ("dataplane", "chain"),
    [
        (DataPlane.NFTABLES, ("kube-proxy", "nat-prerouting")),
        (DataPlane.IPTABLES_LEGACY, ("nat", "PREROUTING")),
        (DataPlane.IPTABLES_NFT, ("nat", "PREROUTING")),
    ],
)
def test_each_data_plane_says_where_it_translates(dataplane: DataPlane, chain: tuple[str, str]) -> None:
    """The NAT base chain's name is the one in the rule set."""
    assert rulesets.nat_chain(dataplane, Hook.PREROUTING) == chain


def test_a_sync_knows_its_tool_and_its_commits() -> None:
    """A sync of iptables commits filter, then nat, that of nftables once; IPv6 has a tool of its own."""
    for family, tool in ((IpFamily.IPV4, "iptables"), (IpFamily.IPV6, "ip6tables")):
        services = make_services(3, family=family)
        after = change_endpoint(services[0], 0)
        legacy = rulesets.change(DataPlane.IPTABLES_LEGACY, services, services[0], after)
        assert legacy.argv == (f"{tool}-legacy-restore", "-w", "5", "--noflush", "--counters")
        assert legacy.commits == 2
        assert rulesets.change(DataPlane.NFTABLES, services, services[0], after).commits == 1


def test_services_of_two_families_are_refused() -> None:
    """A table is of one family."""
    with pytest.raises(ValueError, match="ipv4"):
        rules_iptables.full(IpFamily.IPV4, make_services(1, family=IpFamily.IPV6))
