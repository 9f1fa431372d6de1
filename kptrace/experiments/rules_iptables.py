# SPDX-License-Identifier: Apache-2.0
"""Rule sets as kube-proxy's iptables mode writes them (1.36), as input for `iptables-restore`: pure."""

from collections.abc import Iterator, Sequence
from ipaddress import ip_address

from kptrace.experiments.chain_names import (
    host_port,
    iptables_endpoint_chain,
    iptables_external_chain,
    iptables_service_chain,
)
from kptrace.experiments.services import PLANS, ServiceSpec
from kptrace.model.identity import Endpoint, ServiceAddress
from kptrace.model.netfilter import IpFamily

#: Above so many endpoints kube-proxy leaves the endpoints' comments out ("large cluster mode").
LARGE_ENDPOINTS = 1000
_MARK = "0x00004000"
_FILTER_CHAINS = (
    "KUBE-SERVICES",
    "KUBE-EXTERNAL-SERVICES",
    "KUBE-FORWARD",
    "KUBE-NODEPORTS",
    "KUBE-PROXY-FIREWALL",
)
_NAT_CHAINS = ("KUBE-SERVICES", "KUBE-NODEPORTS", "KUBE-POSTROUTING", "KUBE-MARK-MASQ")
_NEW = "-m conntrack --ctstate NEW "
#: Jumps from base chains: chain, match, comment, target.
_FILTER_JUMPS = (
    ("INPUT", _NEW, "kubernetes load balancer firewall", "KUBE-PROXY-FIREWALL"),
    ("INPUT", "", "kubernetes health check service ports", "KUBE-NODEPORTS"),
    ("INPUT", _NEW, "kubernetes externally-visible service portals", "KUBE-EXTERNAL-SERVICES"),
    ("FORWARD", _NEW, "kubernetes load balancer firewall", "KUBE-PROXY-FIREWALL"),
    ("FORWARD", "", "kubernetes forwarding rules", "KUBE-FORWARD"),
    ("FORWARD", _NEW, "kubernetes service portals", "KUBE-SERVICES"),
    ("FORWARD", _NEW, "kubernetes externally-visible service portals", "KUBE-EXTERNAL-SERVICES"),
    ("OUTPUT", _NEW, "kubernetes load balancer firewall", "KUBE-PROXY-FIREWALL"),
    ("OUTPUT", _NEW, "kubernetes service portals", "KUBE-SERVICES"),
)
_NAT_JUMPS = (
    ("PREROUTING", "", "kubernetes service portals", "KUBE-SERVICES"),
    ("OUTPUT", "", "kubernetes service portals", "KUBE-SERVICES"),
    ("POSTROUTING", "", "kubernetes postrouting rules", "KUBE-POSTROUTING"),
)


def jumps() -> str:
    """The canary chains and the jumps from base chains, which kube-proxy makes by single commands at its start."""
    lines = ["*mangle", ":KUBE-PROXY-CANARY - [0:0]", "COMMIT"]
    for table, chains, rules in (
        ("filter", _FILTER_CHAINS, _FILTER_JUMPS),
        ("nat", _NAT_CHAINS, _NAT_JUMPS),
    ):
        lines += [f"*{table}", ":KUBE-PROXY-CANARY - [0:0]", *(f":{chain} - [0:0]" for chain in chains)]
        lines += [
            f'-A {chain} {match}-m comment --comment "{comment}" -j {target}'
            for chain, match, comment, target in rules
        ]
        lines.append("COMMIT")
    return "\n".join(lines) + "\n"


def is_large(services: Sequence[ServiceSpec]) -> bool:
    """Whether kube-proxy would be in large cluster mode."""
    return sum(len(service.endpoints) for service in services) > LARGE_ENDPOINTS


def _match(address: ServiceAddress) -> str:
    protocol = address.protocol.name.lower()
    return f"-m {protocol} -p {protocol} -d {address.ip} --dport {address.port}"


def _filter_table(services: Sequence[ServiceSpec]) -> Iterator[str]:
    yield "*filter"
    yield from (f":{chain} - [0:0]" for chain in _FILTER_CHAINS)
    for service in services:
        if not service.endpoints:
            for chain, address in zip(
                ("KUBE-SERVICES", "KUBE-EXTERNAL-SERVICES"), service.addresses, strict=False
            ):
                yield (
                    f'-A {chain} -m comment --comment "{service.full_name} has no endpoints" '
                    f"{_match(address)} -j REJECT"
                )
    yield "-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP"
    yield (
        '-A KUBE-FORWARD -m comment --comment "kubernetes forwarding rules" '
        f"-m mark --mark {_MARK}/{_MARK} -j ACCEPT"
    )
    yield (
        '-A KUBE-FORWARD -m comment --comment "kubernetes forwarding conntrack rule" '
        "-m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT"
    )
    yield "COMMIT"


def _dispatch_rules(service: ServiceSpec) -> Iterator[str]:
    """What leads from KUBE-SERVICES to a Service: its cluster IP and its external address."""
    jumps_to = [("cluster IP", service.address, iptables_service_chain(service))]
    if service.external is not None:
        jumps_to.append(("loadbalancer IP", service.external, iptables_external_chain(service)))
    for what, address, chain in jumps_to:
        comment = f'-m comment --comment "{service.full_name} {what}"'
        yield f"-A KUBE-SERVICES {comment} {_match(address)} -j {chain}"


def _service_rules(service: ServiceSpec, *, large: bool) -> Iterator[str]:
    """The rules in a Service's own chain, and in that of its external address."""
    chain = iptables_service_chain(service)
    cluster = PLANS[service.family].cluster
    yield (
        f'-A {chain} -m comment --comment "{service.full_name} cluster IP" {_match(service.address)} '
        f"! -s {cluster} -j KUBE-MARK-MASQ"
    )
    if service.external is not None:
        external = iptables_external_chain(service)
        # Policy Cluster: the back end may be on another node, so the answer has to come back by this one.
        yield (
            f'-A {external} -m comment --comment "masquerade traffic for {service.full_name} external destinations" '
            "-j KUBE-MARK-MASQ"
        )
        yield f"-A {external} -j {chain}"
    left = len(service.endpoints)
    for endpoint in service.endpoints:
        comment = "" if large else f'-m comment --comment "{service.full_name} -> {host_port(endpoint)}" '
        random = f"-m statistic --mode random --probability {1 / left:.10f} " if left > 1 else ""
        yield f"-A {chain} {comment}{random}-j {iptables_endpoint_chain(service, endpoint)}"
        left -= 1


def _endpoint_rules(service: ServiceSpec, endpoint: Endpoint, *, large: bool) -> Iterator[str]:
    """The rules in an endpoint's chain."""
    chain = iptables_endpoint_chain(service, endpoint)
    comment = "" if large else f"-m comment --comment {service.full_name} "
    protocol = service.protocol
    yield f"-A {chain} {comment}-s {ip_address(endpoint.ip)} -j KUBE-MARK-MASQ"
    yield f"-A {chain} {comment}-m {protocol} -p {protocol} -j DNAT --to-destination {host_port(endpoint)}"


def _nat_table(
    services: Sequence[ServiceSpec],
    written: Sequence[ServiceSpec],
    stale: Sequence[str] = (),
    *,
    large: bool,
) -> Iterator[str]:
    """The nat table's part of a sync: all Services' dispatch rules, the chains of `written`, and `stale` deleted."""
    yield "*nat"
    yield from (f":{chain} - [0:0]" for chain in _NAT_CHAINS)
    backed = [service for service in written if service.endpoints]
    for service in backed:
        if service.external is not None:
            yield f":{iptables_external_chain(service)} - [0:0]"
        yield f":{iptables_service_chain(service)} - [0:0]"
        yield from (
            f":{iptables_endpoint_chain(service, endpoint)} - [0:0]" for endpoint in service.endpoints
        )
    yield from (f":{chain} - [0:0]" for chain in stale)
    yield f"-A KUBE-POSTROUTING -m mark ! --mark {_MARK}/{_MARK} -j RETURN"
    yield f"-A KUBE-POSTROUTING -j MARK --xor-mark {_MARK}"
    yield (
        '-A KUBE-POSTROUTING -m comment --comment "kubernetes service traffic requiring SNAT" '
        "-j MASQUERADE --random-fully"
    )
    yield f"-A KUBE-MARK-MASQ -j MARK --or-mark {_MARK}"
    for service in services:
        if service.endpoints:
            yield from _dispatch_rules(service)
    for service in backed:
        yield from _service_rules(service, large=large)
        for endpoint in service.endpoints:
            yield from _endpoint_rules(service, endpoint, large=large)
    yield (
        '-A KUBE-SERVICES -m comment --comment "kubernetes service nodeports; NOTE: this must be the last rule '
        'in this chain" -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS'
    )
    yield from (f"-X {chain}" for chain in stale)
    yield "COMMIT"


def full(family: IpFamily, services: Sequence[ServiceSpec]) -> str:
    """The full sync of one family: needs the `jumps`, and `--noflush`."""
    if any(service.family is not family for service in services):
        raise ValueError(f"these Services are not all {family}")
    lines = [*_filter_table(services), *_nat_table(services, services, large=is_large(services))]
    return "\n".join(lines) + "\n"


def change(services: Sequence[ServiceSpec], before: ServiceSpec, after: ServiceSpec) -> str:
    """The partial sync of one Service whose endpoints changed; `services` are all, as they are afterwards."""
    kept = {iptables_endpoint_chain(after, endpoint) for endpoint in after.endpoints}
    stale = [
        chain
        for endpoint in before.endpoints
        if (chain := iptables_endpoint_chain(before, endpoint)) not in kept
    ]
    if before.endpoints and not after.endpoints:
        stale.append(iptables_service_chain(before))
        if before.external is not None:
            stale.append(iptables_external_chain(before))
    lines = [*_filter_table(services), *_nat_table(services, [after], stale, large=is_large(services))]
    return "\n".join(lines) + "\n"


def remove() -> str:
    """What empties the tables, for a restore without `--noflush`."""
    return "".join(f"*{table}\nCOMMIT\n" for table in ("mangle", "filter", "nat"))
