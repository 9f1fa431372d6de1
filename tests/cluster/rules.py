# SPDX-License-Identifier: Apache-2.0
"""What kube-proxy has installed, by the tools that the kernel's rules are listed with: the oracle of the cluster tests."""

import re
from collections import defaultdict
from collections.abc import Mapping

from kptrace.experiments.netns import Namespace
from kptrace.model.errors import UnsupportedError
from tests.cluster.kubeproxy import Mode

#: The endpoints (`10.244.0.1:8080`) of each Service port (`namespace/name:port`) that has any.
Installed = Mapping[str, frozenset[str]]

# A body may be empty.
_NFT_CHAIN = re.compile(r"chain (service-\S+) \{\n((?:\t\t.*\n)*)\t\}")
_NFT_CLUSTER_IPS = re.compile(r"map service-ips \{\n((?:\t\t.*\n)*)\t\}")
_NFT_GOTO = re.compile(r"goto (service-[A-Z0-9]{8}-([^/\s]+/[^/\s]+)/\w+/([^\s,]*))")
_NFT_ENDPOINT = re.compile(r"(?<=: )([0-9.]+|[0-9a-f:]+) \. (\d+)")
_SERVICE = re.compile(r'^-A KUBE-SERVICES .*--comment "(\S+) cluster IP" .*-j (KUBE-SVC-\w+)$')
_JUMP = re.compile(r"^-A (KUBE-SVC-\w+) .*-j (KUBE-SEP-\w+)$")
_DNAT = re.compile(r"^-A (KUBE-SEP-\w+) .*-j DNAT --to-destination (\S+)$")


def installed(namespace: Namespace, mode: Mode, *, ipv6: bool = False) -> Installed:
    """The endpoints of the cluster IPs of one family; none where there is no table."""
    if mode is Mode.NFTABLES:
        return _from_nft(_output(namespace, "nft", "list", "table", "ip6" if ipv6 else "ip", "kube-proxy"))
    prefix = "ip6tables" if ipv6 else "iptables"
    variant = mode.removeprefix("iptables-")
    return _from_iptables(_output(namespace, f"{prefix}-{variant}-save", "-t", "nat"))


def _output(namespace: Namespace, *argv: str) -> str:
    try:
        return namespace.run(argv)
    except UnsupportedError as error:
        if "No such file or directory" in str(error):  # the table is not there yet
            return ""
        raise


def _from_nft(text: str) -> Installed:
    bodies = dict(_NFT_CHAIN.findall(text))
    found: dict[str, frozenset[str]] = {}
    # A chain that nothing leads to is a Service that has gone: kube-proxy removes it a sync later.
    for addresses in _NFT_CLUSTER_IPS.findall(text):
        for chain, name, port in _NFT_GOTO.findall(addresses):
            ends = frozenset(f"{ip}:{number}" for ip, number in _NFT_ENDPOINT.findall(bodies[chain]))
            found[f"{name}:{port}"] = ends
    return found


def _from_iptables(text: str) -> Installed:
    lines = text.splitlines()
    chains = {match[2]: match[1] for match in map(_SERVICE.match, lines) if match}
    addresses = {match[1]: match[2] for match in map(_DNAT.match, lines) if match}
    found: dict[str, set[str]] = defaultdict(set)
    for match in filter(None, map(_JUMP.match, lines)):
        if match[1] in chains:
            found[chains[match[1]]].add(addresses[match[2]])
    return {name: frozenset(ends) for name, ends in found.items()}
