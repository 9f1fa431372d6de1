# SPDX-License-Identifier: Apache-2.0
"""Sizes of the ruleset against what nft lists, through random changes."""

import json
import os
import random
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from kptrace.experiments.netns import Namespace
from kptrace.kernel.bytecode import Bytecode
from kptrace.kernel.compile import Compiler
from kptrace.signals.rewrite_kernel import REQUEST
from tests.native import batches
from tests.native.rewrite_bench import RewriteBench

#: `KPTRACE_CHANGES=1000` is the full-length run.
CHANGES = int(os.environ.get("KPTRACE_CHANGES", "200"))
FAMILIES = {"ip": "ipv4", "ip6": "ipv6", "inet": "inet"}


@pytest.fixture(scope="module")
def bytecode() -> Bytecode:
    """The rewrite programs, compiled once."""
    return Compiler(Path("/sys/kernel/btf/vmlinux"), None).build(REQUEST)


@pytest.fixture
def bench(bytecode: Bytecode, namespace: Namespace) -> Iterator[RewriteBench]:
    """The signal on an empty namespace; one dump at the start and then only where it is needed."""
    made = RewriteBench(bytecode, namespace)
    yield made
    made.close()


@dataclass
class Churn:
    """Makes random nft scripts, most of which apply."""

    chooser: random.Random

    def script(self) -> str:
        """One to three statements, as one transaction."""
        return "\n".join(self.statement() for _ in range(self.chooser.choice((1, 1, 2, 3)))) + "\n"

    def statement(self) -> str:
        """One random statement, mostly with all that it needs."""
        family, table = self.chooser.choice([("ip", "kube-proxy"), ("ip6", "kube-proxy"), ("inet", "fw")])
        place = f"{family} {table}"
        chain = f"c{self.chooser.randrange(6)}"
        name = f"s{self.chooser.randrange(4)}"
        port = self.chooser.randrange(1, 60)
        ports = ", ".join(str(self.chooser.randrange(1, 60)) for _ in range(self.chooser.randrange(1, 9)))
        # What a statement needs is mostly made with it, as writers do; now and then it is missing, and all is refused.
        needs = (
            f"add table {place}\nadd chain {place} {chain}\nadd set {place} {name} {{ type inet_service; }}\n"
        )
        needs += f"add map {place} m{port % 2} {{ type inet_service : verdict; }}\n"
        needs += f"add set {place} range {{ type inet_service; flags interval; }}\n"
        return self.chooser.choice((needs, needs, needs, "")) + self.chooser.choice(
            [
                f"add chain {place} b{port % 3} {{ type filter hook output priority {port % 3}; }}",
                f"add rule {place} {chain} tcp dport {port} counter",
                f"add rule {place} {chain} log\nadd rule {place} {chain} tcp dport @{name} drop",
                f"insert rule {place} {chain} tcp dport {{ {ports} }} accept",
                f"add rule {place} {chain} tcp dport vmap {{ {port} : drop, {port + 100} : accept }}",
                f"flush chain {place} {chain}\nadd rule {place} {chain} counter",
                f"flush chain {place} {chain}",
                f"delete chain {place} {chain}",
                f"add element {place} {name} {{ {ports} }}",
                f"add element {place} m{port % 2} {{ {port} : drop }}",
                f"add element {place} {name} {{ {port} }}\ndelete element {place} {name} {{ {port} }}",
                f"flush set {place} {name}",
                f"delete set {place} {name}",
                f"add element {place} range {{ {port * 10}-{port * 10 + 5} }}",
                f"flush set {place} range\nadd element {place} range {{ {port}-{port + 5}, 2000-3000 }}",
                f"flush table {place}" if port < 20 else f"add rule {place} {chain} log",
                f"delete table {place}" if port < 10 else f"add rule {place} {chain} drop",
            ]
        )


def nft(namespace: Namespace, text: str, *flags: str) -> int:
    """Run a script, whatever comes of it."""
    return namespace.call(
        lambda: (
            subprocess.run(
                ["nft", *flags, "-f", "-"], input=text, text=True, capture_output=True, check=False
            ).returncode
        )
    )


def handles(namespace: Namespace) -> list[tuple[str, str, str, int]]:
    """(family, table, chain, handle) of every rule."""
    listed = json.loads(namespace.run(["nft", "-j", "-a", "list", "ruleset"]))["nftables"]
    rules = [item["rule"] for item in listed if "rule" in item]
    return [(rule["family"], rule["table"], rule["chain"], rule["handle"]) for rule in rules]


def listed_objects(namespace: Namespace) -> dict[tuple[str, str, str], int]:
    """Counts by (family, table, object), as nft lists them."""
    counts: Counter[tuple[str, str, str]] = Counter()
    tables = set()
    for item in json.loads(namespace.run(["nft", "-j", "list", "ruleset"]))["nftables"]:
        for kind, body in item.items():
            if kind == "table":
                tables.add((FAMILIES[body["family"]], body["name"]))
                continue
            if kind not in ("chain", "rule", "set", "map"):
                continue
            place = FAMILIES[body["family"]], body["table"]
            counts[*place, "set" if kind == "map" else kind] += 1
            counts[*place, "element"] += len(body.get("elem", ()))
    return {
        (*place, thing): counts[*place, thing]
        for place in tables
        for thing in ("chain", "rule", "set", "element")
    }


def gauges(bench: RewriteBench) -> dict[tuple[str, str, str], int]:
    """Counts by (family, table, object), as the signal has them."""
    return {
        (row["family"], row["table"], row["object"]): int(value)
        for row, value in bench.rows("kptrace_ruleset_objects")
    }


@pytest.mark.timeout(600)
def test_sizes_follow_random_changes(bench: RewriteBench, namespace: Namespace) -> None:
    """After every few of many random changes the gauges equal nft's listing, by batches alone: nothing is dumped again."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    churn = Churn(random.Random(seed))
    applied = refused = 0
    for step in range(CHANGES):
        if step % 7 == 3 and (rules := handles(namespace)):
            family, table, chain, handle = churn.chooser.choice(rules)
            verb = churn.chooser.choice(
                ("delete rule {} handle {}", "replace rule {} handle {} counter drop")
            )
            text = verb.format(f"{family} {table} {chain}", handle) + "\n"
        else:
            text = churn.script()
        if step % 11 == 5:
            nft(namespace, text, "--check")
        elif nft(namespace, text):
            refused += 1
        else:
            applied += 1
        if step % 20 == 19 or step == CHANGES - 1:
            bench.settle()
            assert bench.value("kptrace_ruleset_objects_exact") == 1, (seed, step, text)
            assert gauges(bench) == listed_objects(namespace), (seed, step, text)
    print(f"{applied} applied, {refused} refused")
    assert applied > CHANGES / 3 and refused > 0
    assert bench.signal._objects.dumps == 1
    assert bench.lost("untraced_commit") == 0


@pytest.mark.parametrize(
    "text",
    [
        "add set ip t dyn { type ipv4_addr; flags dynamic,timeout; timeout 1h; }\nadd element ip t dyn { 192.0.2.1 }\n",
        "".join(f"add rule ip t c tcp dport {port} counter\n" for port in range(1, 1000)),
        "add rule ip t c jump { counter; drop; }\n",
        "rename chain ip t c d\n",
    ],
    ids=["dynamic", "long", "nested", "rename"],
)
def test_sizes_are_read_again_where_a_batch_does_not_tell(
    bench: RewriteBench, namespace: Namespace, text: str
) -> None:
    """What cannot be followed makes the gauges inexact, until a dump makes them equal to nft's listing."""
    assert nft(namespace, "add table ip t\nadd chain ip t c\nadd rule ip t c counter\n") == 0
    assert nft(namespace, text) == 0
    bench.settle()
    bench.until(lambda: bench.value("kptrace_ruleset_objects_exact") == 1)
    assert gauges(bench) == listed_objects(namespace)


def test_destroyed_chains_are_gone(bench: RewriteBench, namespace: Namespace) -> None:
    """A chain that a batch destroys, there or not, leaves the gauges equal to nft's listing."""
    assert (
        nft(namespace, "add table ip t\nadd chain ip t c\nadd rule ip t c counter\nadd chain ip t d\n") == 0
    )

    def destroy() -> list[int]:
        with batches.open_socket() as channel:
            channel.send(
                batches.batch(batches.destroy_chain("t", "c"), batches.destroy_chain("t", "nowhere"))
            )
            return batches.answers(channel)

    assert namespace.call(destroy) == []
    bench.settle()
    bench.until(lambda: bench.value("kptrace_ruleset_objects_exact") == 1)
    assert gauges(bench) == listed_objects(namespace)
    assert bench.value("kptrace_ruleset_objects", object="chain") == 1


def test_what_was_there_before_is_counted(bytecode: Bytecode, namespace: Namespace) -> None:
    """A ruleset of 5,000 chains that is older than the daemon has its sizes within the first moments."""
    chains = "".join(
        f"add chain ip kube-proxy c{n}\nadd rule ip kube-proxy c{n} counter\n" for n in range(5000)
    )
    elements = ", ".join(f"10.0.{n // 250}.{n % 250}" for n in range(5000))
    assert (
        nft(
            namespace,
            f"add table ip kube-proxy\nadd set ip kube-proxy ips {{ type ipv4_addr; }}\n{chains}"
            f"add element ip kube-proxy ips {{ {elements} }}\n",
        )
        == 0
    )
    bench = RewriteBench(bytecode, namespace)
    try:
        place = ("ipv4", "kube-proxy")
        expected = {"chain": 5000, "rule": 5000, "set": 1, "element": 5000}
        assert gauges(bench) == {(*place, thing): count for thing, count in expected.items()}
        print(f"dump cost {bench.signal._objects._cost * 1e3:.1f} ms of CPU")
    finally:
        bench.close()
