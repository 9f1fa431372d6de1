# SPDX-License-Identifier: Apache-2.0
import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kptrace.dataplanes.iptables.legacy import Replace, decode_replace, legacy_chains, table_names
from kptrace.dataplanes.nftables.batch import Batch, BatchKind, decode_batch, is_batch
from kptrace.dataplanes.nftables.chains import base_chains, dormant_tables
from kptrace.dataplanes.nftables.netlink import NftMessage
from kptrace.dataplanes.nftables.netlink_socket import NfnetlinkSocket
from kptrace.experiments.netns import Namespace
from kptrace.model.netfilter import BaseChain, ChainType, DataPlane, Hook, IpFamily

RULESET = """
table ip kube-proxy {
	chain nat-output { type nat hook output priority -50; }
	chain filter-input { type filter hook input priority -110; }
	chain service-x { }
}
table inet fw {
	chain pre { type filter hook prerouting priority -300; }
	chain post { type filter hook postrouting priority 110; ct state established accept; }
	chain from_lo { type filter hook ingress device "lo" priority 0; }
	chain out { type route hook output priority -150; }
}
table ip6 six { chain out { type filter hook output priority 0; } }
table bridge br { chain in { type filter hook input priority 0; } }
table arp a { chain in { type filter hook input priority 0; } }
table netdev nd { chain in { type filter hook ingress device "lo" priority 0; } }
"""


@contextmanager
def nfnetlink(namespace: Namespace) -> Iterator[NfnetlinkSocket]:
    """A socket in the namespace."""
    with namespace.enter():
        channel = NfnetlinkSocket.open()
    try:
        yield channel
    finally:
        channel.close()


def installed(namespace: Namespace) -> tuple[BaseChain, ...]:
    """All base chains of the namespace."""
    with nfnetlink(namespace) as channel:
        found = base_chains(
            channel.dump(NftMessage.GETCHAIN), dormant_tables(channel.dump(NftMessage.GETTABLE))
        )
    with namespace.enter():
        names = table_names(Path("/proc/thread-self/net"))
    return (*found, *legacy_chains(names))


def nft(namespace: Namespace, rules: str) -> None:
    """Apply rules; nft wants a line's end after each brace."""
    namespace.run(["nft", "-f", "-"], stdin=rules.replace("}", "}\n"))


def as_nft_lists(namespace: Namespace) -> set[tuple[str, str, str, str, int, str]]:
    """The oracle: base chains of the IP families as nft lists them."""
    listed = set()
    for item in json.loads(namespace.run(["nft", "-j", "list", "chains"]))["nftables"]:
        chain = item.get("chain", {})
        if chain.get("hook") in {hook.label for hook in Hook} and chain["family"] in ("ip", "ip6", "inet"):
            for family in {"ip": ["ipv4"], "ip6": ["ipv6"], "inet": ["ipv4", "ipv6"]}[chain["family"]]:
                listed.add(
                    (family, chain["table"], chain["name"], chain["hook"], chain["prio"], chain["type"])
                )
    return listed


def test_base_chains_are_those_that_nft_lists(namespace: Namespace) -> None:
    """Every family's chains, hooks, priorities and types agree with nft's own listing."""
    nft(namespace, RULESET)
    found = {
        (c.family.value, c.table, c.chain, c.hook.label, c.priority, c.type.value)
        for c in installed(namespace)
    }
    assert found == as_nft_lists(namespace)
    assert len(found) == 9


def test_iptables_nft_is_told_from_nftables(namespace: Namespace) -> None:
    """Chains that iptables-nft makes are its own; kube-proxy's beside them are nftables'."""
    nft(namespace, "table ip kube-proxy { chain nat-output { type nat hook output priority -100; } }")
    for tool, table, chain in [
        ("iptables-nft", "nat", "OUTPUT"),
        ("ip6tables-nft", "filter", "FORWARD"),
        ("iptables-nft", "mangle", "OUTPUT"),
    ]:
        namespace.run([tool, "-t", table, "-A", chain, "-j", "ACCEPT"])
    found = {(c.family, c.table, c.chain): c for c in installed(namespace)}
    assert found[IpFamily.IPV4, "nat", "OUTPUT"].dataplane is DataPlane.IPTABLES_NFT
    assert found[IpFamily.IPV4, "nat", "OUTPUT"].type is ChainType.NAT
    assert found[IpFamily.IPV6, "filter", "FORWARD"].dataplane is DataPlane.IPTABLES_NFT
    assert found[IpFamily.IPV4, "mangle", "OUTPUT"].type is ChainType.ROUTE
    assert found[IpFamily.IPV4, "kube-proxy", "nat-output"].dataplane is DataPlane.NFTABLES


def test_legacy_tables_are_found_once_they_are_used(namespace: Namespace) -> None:
    """A table appears with its first use, in its family only."""
    assert installed(namespace) == ()
    namespace.run(["iptables-legacy", "-t", "nat", "-N", "KUBE-SERVICES"])
    namespace.run(["ip6tables-legacy", "-t", "raw", "-S"])
    assert {(c.family, c.table, c.hook) for c in installed(namespace)} == {
        *((IpFamily.IPV4, "nat", hook) for hook in Hook if hook is not Hook.FORWARD),
        *((IpFamily.IPV6, "raw", hook) for hook in (Hook.PREROUTING, Hook.OUTPUT)),
    }


def test_a_dormant_table_has_no_chains_until_it_wakes(namespace: Namespace) -> None:
    """Its hooks are not registered, so there is nothing to enclose."""
    nft(namespace, "table ip t { flags dormant; chain c { type filter hook input priority 0; } }")
    assert installed(namespace) == ()
    nft(namespace, "table ip t { }")
    assert len(installed(namespace)) == 1


def test_the_generation_moves_by_one_with_each_commit(namespace: Namespace) -> None:
    """Commits in another namespace, and reading, move nothing."""
    with nfnetlink(namespace) as channel, Namespace("test") as other:
        before = channel.generation()
        nft(namespace, RULESET)
        nft(other, RULESET)
        channel.dump(NftMessage.GETRULE)
        assert channel.generation() == before + 1


def test_twelve_thousand_chains_are_dumped_and_base_chains_found(namespace: Namespace) -> None:
    """A dump of many datagrams is whole."""
    services = "".join(f"chain service-ABCDEFGH-demo/web{n}/tcp/http {{ }}\n" for n in range(12_000))
    nft(
        namespace,
        f"table ip kube-proxy {{ chain nat-output {{ type nat hook output priority 0; }}\n{services} }}",
    )
    with nfnetlink(namespace) as channel:
        dump = channel.dump(NftMessage.GETCHAIN)
    assert len(dump) == 12_001
    assert [c.chain for c in base_chains(dump)] == ["nat-output"]


def replacements(namespace: Namespace, argv: list[str], rules: str, trace: Path) -> list[Replace]:
    """The headers of the replacements that a legacy writer hands to setsockopt."""
    namespace.run(
        ["strace", "-f", "-xx", "-s", "120", "-e", "trace=setsockopt", "-o", str(trace), *argv], stdin=rules
    )
    values = re.findall(r'IPT_SO_SET_REPLACE, "((?:\\x[0-9a-f]{2})+)"', trace.read_text())
    decoded = (decode_replace(bytes.fromhex(each.replace("\\x", ""))) for each in values)
    return [each for each in decoded if each is not None]


def batches_sent(namespace: Namespace, argv: list[str], rules: str, trace: Path) -> list[Batch]:
    """What a writer's batches decode to; strace dumps the buffers of calls that it need not interpret."""
    namespace.run(
        ["strace", "-f", "-o", str(trace), "-e", "trace=sendmsg,sendto", "-e", "raw=sendmsg,sendto",
         "-e", "write=all", *argv],
        stdin=rules,
    )  # fmt: skip
    buffers: list[bytearray] = []
    for line in trace.read_text().splitlines():
        if re.search(r"\bsend(msg|to)\(", line):
            buffers.append(bytearray())
        elif match := re.search(r"\| [0-9a-f]{5,}  ((?:[0-9a-f]{2} {1,2})+)", line):
            buffers[-1] += bytes.fromhex(match[1])
    return [decode_batch(bytes(each)) for each in buffers if is_batch(bytes(each))]


WRITE = """
add table ip kube-proxy
add chain ip kube-proxy nat-output { type nat hook output priority -100 ; }
add chain ip kube-proxy service-x
add chain ip kube-proxy service-y
add set ip kube-proxy cluster-ips { type ipv4_addr ; }
add element ip kube-proxy cluster-ips { 10.96.0.1, 10.96.0.2, 10.96.0.3 }
add rule ip kube-proxy service-x counter accept
add rule ip kube-proxy service-y counter accept
add rule ip kube-proxy service-y counter drop
"""
CHANGE = """
flush chain ip kube-proxy service-x
add rule ip kube-proxy service-x counter drop
delete element ip kube-proxy cluster-ips { 10.96.0.3 }
flush chain ip kube-proxy service-y
delete chain ip kube-proxy service-y
"""


def counts(batch: Batch) -> Counter[tuple[str, str]]:
    """Objects by kind and operation."""
    found: Counter[tuple[str, str]] = Counter()
    for each in batch.objects:
        found[each.object, each.operation] += each.count
    return found


def test_what_nft_sends_is_counted(namespace: Namespace, tmp_path: Path) -> None:
    """The objects of nft's own batches are those of its script."""
    (write,) = batches_sent(namespace, ["nft", "-f", "-"], WRITE, tmp_path / "trace")
    assert (write.kind, write.truncated) == (BatchKind.COMMITTABLE, False)
    assert write.tables == {("ipv4", "kube-proxy")}
    assert counts(write) == {
        ("table", "add"): 1,
        ("chain", "add"): 3,
        ("set", "add"): 1,
        ("element", "add"): 3,
        ("rule", "add"): 3,
    }
    assert write.base_chain_touched
    (change,) = batches_sent(namespace, ["nft", "-f", "-"], CHANGE, tmp_path / "trace")
    assert counts(change)["rule", "add"] == counts(change)["element", "delete"] == 1
    assert counts(change)["chain", "delete"] == 1
    assert change.deleted_chains == {("ipv4", "kube-proxy", "service-y")}
    assert {name for _, _, name in change.touched_chains} == {"service-x", "service-y"}
    assert not change.base_chain_touched


def test_a_check_is_told_from_a_commit(namespace: Namespace, tmp_path: Path) -> None:
    """`nft --check` sends the same without an end."""
    (checked,) = batches_sent(namespace, ["nft", "--check", "-f", "-"], WRITE, tmp_path / "trace")
    assert checked.kind is BatchKind.CHECKED
    assert counts(checked)["rule", "add"] == 3


def test_what_iptables_nft_restore_sends_is_counted(namespace: Namespace, tmp_path: Path) -> None:
    """The chain and the rules of a restore are in its batches."""
    rules = (
        "*nat\n:KUBE-SVC-A - [0:0]\n-A KUBE-SVC-A -p tcp -j ACCEPT\n-A KUBE-SVC-A -p udp -j ACCEPT\nCOMMIT\n"
    )
    batches = batches_sent(namespace, ["iptables-nft-restore", "--noflush"], rules, tmp_path / "trace")
    total: Counter[tuple[str, str]] = sum((counts(each) for each in batches), Counter())
    assert total["rule", "add"] == 2
    assert ("ipv4", "nat", "KUBE-SVC-A") in frozenset().union(*(each.touched_chains for each in batches))
    assert {each.kind for each in batches} == {BatchKind.COMMITTABLE}


def test_what_iptables_legacy_sends_is_read(namespace: Namespace, tmp_path: Path) -> None:
    """The header of the table's replacement names the table and counts what the kernel then has."""
    rules = "*nat\n:KUBE-SVC-A - [0:0]\n-A KUBE-SVC-A -p tcp -j ACCEPT\nCOMMIT\n"
    found = replacements(namespace, ["iptables-legacy-restore", "--noflush"], rules, tmp_path / "trace")
    (replaced,) = [each for each in found if each.table == "nat"]
    # Four built-in chains with a policy each, the new chain's head, rule and end, and the table's error entry.
    assert replaced.entries == 4 + 3 + 1
    assert replaced.old_entries == 4 + 1
    assert replaced.valid_hooks == 0b11011
