# SPDX-License-Identifier: Apache-2.0
"""Rule sets as kube-proxy's nftables mode writes them (1.36), as input for `nft -f -`: pure."""

from collections.abc import Iterator, Sequence

from kptrace.experiments.chain_names import nftables_external_chain, nftables_service_chain
from kptrace.experiments.services import PLANS, ServiceSpec
from kptrace.model.netfilter import IpFamily

TABLE = "kube-proxy"
_MASQUERADE_MARK = "0x00004000"

#: Base chains: name, type, hook, priority.
BASE_CHAINS = (
    ("filter-prerouting-pre-dnat", "filter", "prerouting", -110),
    ("filter-output-pre-dnat", "filter", "output", -110),
    ("filter-input", "filter", "input", 0),
    ("filter-forward", "filter", "forward", 0),
    ("filter-output", "filter", "output", 0),
    ("nat-prerouting", "nat", "prerouting", -100),
    ("nat-output", "nat", "output", -100),
    ("nat-postrouting", "nat", "postrouting", 100),
)
_CHAINS = (
    "services",
    "service-endpoints-check",
    "nodeport-endpoints-check",
    "cluster-ips-check",
    "firewall-check",
    "masquerading",
    "reject-chain",
)


def _family(family: IpFamily) -> tuple[str, str]:
    """The table's family and the type of an address in it."""
    return ("ip", "ipv4_addr") if family is IpFamily.IPV4 else ("ip6", "ipv6_addr")


def _sets(kind: str) -> Iterator[tuple[str, str, str]]:
    """Every named set and map: what it is, its name and its declaration."""
    service = f"{kind} . inet_proto . inet_service"
    nodeport = "inet_proto . inet_service"
    no_endpoint = 'comment "vmap to drop or reject packets to services with no endpoints" ;'
    addresses = 'comment "ClusterIP, ExternalIP and LoadBalancer IP traffic" ;'
    yield "set", "cluster-ips", f'type {kind} ; comment "Active ClusterIPs" ;'
    yield "set", "nodeport-ips", f'type {kind} ; comment "IPs that accept NodePort traffic" ;'
    yield "set", "hairpin-connections", f"type {kind} . {kind} . {nodeport} ;"
    yield "map", "firewall-ips", f"type {service} : verdict ;"
    yield "map", "no-endpoint-services", f"type {service} : verdict ; {no_endpoint}"
    yield "map", "no-endpoint-nodeports", f"type {nodeport} : verdict ;"
    yield "map", "service-ips", f"type {service} : verdict ; {addresses}"
    yield "map", "service-nodeports", f'type {nodeport} : verdict ; comment "NodePort traffic" ;'


def _static_rules(family: IpFamily, *, counters: bool) -> Iterator[tuple[str, str]]:
    """The rules that do not depend on Services: chain and rule."""
    ip = _family(family)[0]
    plan = PLANS[family]
    count = "counter " if counters else ""
    target = f"{ip} daddr . meta l4proto . th dport vmap"
    nodeport = f"{ip} daddr @nodeport-ips meta l4proto . th dport vmap"
    yield "filter-prerouting-pre-dnat", "ct state new jump firewall-check"
    yield "filter-output-pre-dnat", "ct state new jump firewall-check"
    yield "filter-input", "ct state new jump nodeport-endpoints-check"
    yield "filter-input", "ct state new jump service-endpoints-check"
    yield "filter-forward", "ct state new jump service-endpoints-check"
    yield "filter-forward", "ct state new jump cluster-ips-check"
    yield "filter-output", "ct state new jump service-endpoints-check"
    yield "filter-output", "ct state new jump cluster-ips-check"
    yield "nat-prerouting", f"{count}jump services"
    yield "nat-output", f"{count}jump services"
    yield "nat-postrouting", "jump masquerading"
    yield "firewall-check", f"{target} @firewall-ips"
    yield "service-endpoints-check", f"{target} @no-endpoint-services"
    yield "nodeport-endpoints-check", f"{nodeport} @no-endpoint-nodeports"
    yield (
        "cluster-ips-check",
        f'{ip} daddr @cluster-ips reject comment "Reject traffic to invalid ports of ClusterIPs"',
    )
    yield (
        "cluster-ips-check",
        f'{ip} daddr {{ {plan.services} }} drop comment "Drop traffic to unallocated ClusterIPs"',
    )
    yield (
        "services",
        f"{ip} daddr @cluster-ips {ip} saddr != {plan.cluster} mark set mark or {_MASQUERADE_MARK} "
        'comment "masquerade clusterIP traffic from outside cluster"',
    )
    yield "services", f"{target} @service-ips"
    yield "services", f"{nodeport} @service-nodeports"
    yield (
        "masquerading",
        f"{ip} saddr . {ip} daddr . meta l4proto . th dport @hairpin-connections masquerade fully-random",
    )
    yield "masquerading", f"mark and {_MASQUERADE_MARK} == 0 return"
    yield "masquerading", f"mark set mark xor {_MASQUERADE_MARK}"
    yield "masquerading", "masquerade fully-random"
    yield "reject-chain", "reject"


def _service_rule(service: ServiceSpec, chain: str) -> str:
    """The one rule of a Service without affinity: its endpoints in an anonymous map."""
    ip = _family(service.family)[0]
    choices = " , ".join(f"{n} : {e.ip} . {e.port}" for n, e in enumerate(service.endpoints))
    return (
        f"add rule {ip} {TABLE} {chain} meta l4proto {service.protocol} "
        f"dnat {ip} addr . port to numgen random mod {len(service.endpoints)} map {{ {choices} }}"
    )


def _chains_of(service: ServiceSpec) -> Iterator[str]:
    """The chains of a Service with endpoints: its own, and that of its external address."""
    if service.endpoints:
        yield nftables_service_chain(service)
        if service.external is not None:
            yield nftables_external_chain(service)


def _emptied(service: ServiceSpec) -> Iterator[str]:
    """What makes these chains, or empties them."""
    where = f"{_family(service.family)[0]} {TABLE}"
    for chain in _chains_of(service):
        yield f"add chain {where} {chain}"
        yield f"flush chain {where} {chain}"


def _rules_of(service: ServiceSpec) -> Iterator[str]:
    """The rules in these chains."""
    if not service.endpoints:
        return
    chain = nftables_service_chain(service)
    if service.external is not None:
        # Policy Cluster: the back end may be on another node, so the answer has to come back by this one.
        external = f"add rule {_family(service.family)[0]} {TABLE} {nftables_external_chain(service)}"
        yield f'{external} mark set mark or {_MASQUERADE_MARK} comment "masquerade"'
        yield f"{external} goto {chain}"
    yield _service_rule(service, chain)


def _elements(service: ServiceSpec) -> Iterator[tuple[str, str, str]]:
    """The map elements that packets to the Service's addresses find: where, its key, and comment and verdict."""
    ip = _family(service.family)[0]
    for address in service.addresses:
        key = f"{address.ip} . {service.protocol} . {address.port}"
        if service.endpoints:
            own = address is service.address
            chain = nftables_service_chain(service) if own else nftables_external_chain(service)
            yield f"element {ip} {TABLE} service-ips", key, f": goto {chain}"
        else:
            verdict = f'comment "{service.full_name}" : goto reject-chain'
            yield f"element {ip} {TABLE} no-endpoint-services", key, verdict


def _add_elements(service: ServiceSpec) -> list[str]:
    return [f"add {where} {{ {key} {value} }}" for where, key, value in _elements(service)]


def full(family: IpFamily, services: Sequence[ServiceSpec], *, counters: bool = False) -> str:
    """The full sync of one family, in one transaction; also over an existing table.

    Args:
        family: IPv4 or IPv6: kube-proxy has a table and a transaction for each.
        services: of that family.
        counters: count what walks nat-prerouting and nat-output, which kube-proxy does not.
    """
    ip, kind = _family(family)
    where = f"{ip} {TABLE}"
    lines = [f'add table {where} {{ comment "rules for kube-proxy" ; }}']
    for name, chain_type, hook, priority in BASE_CHAINS:
        lines.append(f"add chain {where} {name} {{ type {chain_type} hook {hook} priority {priority} ; }}")
        lines.append(f"flush chain {where} {name}")
    for name in _CHAINS:
        lines.append(f"add chain {where} {name}")
        lines.append(f"flush chain {where} {name}")
    for what, name, declaration in _sets(kind):
        lines.append(f"add {what} {where} {name} {{ {declaration} }}")
        lines.append(f"flush {what} {where} {name}")
    lines += [f"add rule {where} {chain} {rule}" for chain, rule in _static_rules(family, counters=counters)]
    for service in services:
        lines += [*_emptied(service), *_rules_of(service)]
    # A Service with several ports has its address once.
    for address in dict.fromkeys(service.address.ip for service in services):
        lines.append(f"add element {where} cluster-ips {{ {address} }}")
    for service in services:
        lines += _add_elements(service)
    return "\n".join(lines) + "\n"


def change(before: ServiceSpec, after: ServiceSpec) -> str:
    """The partial sync of one Service whose endpoints changed."""
    moved = bool(before.endpoints) != bool(after.endpoints)
    lines = [*_emptied(after), *(_add_elements(after) if moved else ()), *_rules_of(after)]
    if moved:
        # Chains that nothing leads to any more stay, empty: kube-proxy removes them a sync later.
        where = f"{_family(after.family)[0]} {TABLE}"
        lines += [f"flush chain {where} {chain}" for chain in _chains_of(before)]
        lines += [f"delete {where} {{ {key} }}" for where, key, _ in _elements(before)]
    return "\n".join(lines) + "\n"


def remove(family: IpFamily) -> str:
    """What takes the family's rules away, also where there are none."""
    where = f"{_family(family)[0]} {TABLE}"
    return f"add table {where}\ndelete table {where}\n"
