# SPDX-License-Identifier: Apache-2.0
"""Rewrites on this machine's kernel: every way in, every outcome, against what the kernel and strace say."""

import os
import re
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from kptrace.experiments.netns import Namespace
from kptrace.kernel.bytecode import Bytecode
from kptrace.kernel.compile import Compiler
from kptrace.signals.rewrite_kernel import REQUEST
from kptrace.signals.rewrite_reduce import BASE_CHAINS
from tests.native import batches
from tests.native.programs import program_ids
from tests.native.rewrite_bench import RewriteBench

Watch = Callable[..., RewriteBench]


#: What older kernels lack: bpf_rdonly_cast() before v6.2, the generation in struct net before v6.17.
NEWER = ("KPT_KFUNC_RDONLY_CAST", "KPT_NET_BASE_SEQ")


@pytest.fixture(scope="module")
def compiled() -> dict[str, Bytecode]:
    """The programs for this kernel, and for one without what is newer."""
    older = replace(REQUEST, facts={name: fact for name, fact in REQUEST.facts.items() if name not in NEWER})
    built = Compiler(Path("/sys/kernel/btf/vmlinux"), None).build_each([REQUEST, older])
    assert all(isinstance(each, Bytecode) for each in built), built
    return {
        name: each for name, each in zip(("new", "old"), built, strict=True) if isinstance(each, Bytecode)
    }


@pytest.fixture(params=["new", "old"])
def bytecode(request: pytest.FixtureRequest, compiled: dict[str, Bytecode]) -> Bytecode:
    """The rewrite programs, in both forms."""
    return compiled[request.param]


@pytest.fixture
def watch(bytecode: Bytecode, namespace: Namespace) -> Iterator[Watch]:
    """Start the rewrite signal on the test's namespace."""
    started: list[RewriteBench] = []

    def start(**options: object) -> RewriteBench:
        started.append(RewriteBench(bytecode, namespace, **options))
        return started[-1]

    yield start
    for each in started:
        each.close()


def send(namespace: Namespace, data: bytes, how: str = "sendmsg") -> list[int]:
    """Send a batch inside and return the kernel's answers."""

    def body() -> list[int]:
        with batches.open_socket() as channel:
            {**batches.SEEN, **batches.UNSEEN}[how](channel, data)
            return batches.answers(channel)

    return namespace.call(body)


def tables(namespace: Namespace) -> str:
    """What nft says is there."""
    return namespace.run(["nft", "list", "tables"])


def tool(namespace: Namespace, argv: list[str], text: str = "") -> int:
    """Run a tool inside, whatever comes of it; its exit code."""
    return namespace.call(
        lambda: subprocess.run(argv, input=text, text=True, capture_output=True, check=False).returncode
    )


@pytest.mark.parametrize("how", batches.SEEN)
def test_every_send_is_seen(watch: Watch, namespace: Namespace, how: str) -> None:
    """A batch is one committed rewrite of its table, whatever system call carried it."""
    bench = watch()
    send(namespace, batches.batch(batches.new_table(how)), how)
    bench.settle()
    assert how in tables(namespace)
    assert bench.outcomes() == {"committed": 1}
    assert bench.outcomes(table=how, family="ipv4", dataplane="nftables") == {"committed": 1}
    bench.settle()
    assert bench.lost("untraced_commit") == 0
    # At once, but for sendmmsg, whose result does not say whether the copy is whole: there the sizes are read again.
    assert how == "sendmmsg" or bench.value("kptrace_ruleset_objects_exact") == 1
    bench.until(lambda: bench.value("kptrace_ruleset_objects_exact") == 1)


@pytest.mark.parametrize("how", batches.UNSEEN)
def test_other_ways_are_counted_as_lost(watch: Watch, namespace: Namespace, how: str) -> None:
    """A commit that no traced system call carried is found missing by the generation, and the sizes are read again."""
    bench = watch()
    send(namespace, batches.batch(batches.new_table(how)), how)
    bench.settle()
    assert how in tables(namespace)
    assert bench.outcomes() == {}
    assert bench.lost("untraced_commit") == 1
    bench.until(lambda: bench.value("kptrace_ruleset_objects_exact") == 1)
    assert [labels["table"] for labels, _ in bench.rows("kptrace_ruleset_objects")] == [how] * 4


@pytest.mark.parametrize("flags", [0, batches.NLM_F_ACK])
def test_outcomes_are_not_the_system_calls(watch: Watch, namespace: Namespace, flags: int) -> None:
    """Failed, checked, empty and committed batches all return success from sendmsg; each is told for what it is."""
    bench = watch()
    table = batches.new_table("t", flags=batches.NLM_F_CREATE | flags)
    wrong = batches.delete_chain("t", "nowhere", flags=flags)
    send(namespace, batches.batch(table))
    failed = send(namespace, batches.batch(table, wrong, table))
    assert [code for code in failed if code] == [2]
    send(namespace, batches.batch(table, end=False))
    send(namespace, batches.batch())
    send(namespace, batches.batch(table))  # it is there: nothing to commit
    assert [code for code in send(namespace, batches.batch(wrong, end=False)) if code] == [2]
    bench.settle()
    assert bench.outcomes() == {"committed": 1, "failed": 2, "checked": 1, "empty": 2}
    bench.settle()
    assert bench.lost("untraced_commit") == 0
    assert bench.value("kptrace_rewrite_objects_total") == 1
    assert len(bench.commits) == 1


def test_unread_answers_of_before_do_not_count(watch: Watch, namespace: Namespace) -> None:
    """A writer that never reads its answers is judged by those of each batch alone."""
    bench = watch()
    acknowledged = batches.new_table("t", flags=batches.NLM_F_CREATE | batches.NLM_F_ACK)

    def write() -> None:
        with batches.open_socket() as channel:
            channel.send(batches.batch(batches.delete_chain("t", "nowhere")))
            channel.send(batches.batch(acknowledged))
            channel.send(
                batches.batch(acknowledged, batches.new_table("u"), batches.delete_chain("u", "nowhere"))
            )
            channel.send(batches.batch(acknowledged, batches.new_table("u")))
            assert batches.answers(channel) == [2, 0, 0, 2, 0]

    namespace.call(write)
    bench.settle()
    assert bench.outcomes() == {"committed": 2, "failed": 2}


def test_other_netlink_traffic_is_no_rewrite(watch: Watch, namespace: Namespace) -> None:
    """Neither dumps, nor what looks like a batch on another kind of socket, are rewrites."""
    bench = watch()

    def others() -> None:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as route:
            route.bind((0, 0))
            route.send(batches.batch())  # 0x10 is RTM_NEWLINK there
        left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        with left, right:
            left.send(batches.batch(batches.new_table("t")))
        Path("/dev/null").write_bytes(batches.batch(batches.new_table("t")))

    namespace.call(others)
    tables(namespace)
    bench.settle()
    assert bench.outcomes() == {}


IPTABLES = "*{table}\n:KUBE-X - [0:0]\n-A KUBE-X -j ACCEPT\n-A OUTPUT -j KUBE-X\nCOMMIT\n"


@pytest.mark.parametrize(
    ("argv", "text", "labels"),
    [
        (
            ["nft", "-f", "-"],
            "add table ip6 kube-proxy\n",
            {"dataplane": "nftables", "family": "ipv6", "table": "kube-proxy"},
        ),
        (
            ["iptables-nft-restore", "--noflush"],
            IPTABLES.format(table="nat"),
            {"dataplane": "iptables-nft", "family": "ipv4", "table": "nat"},
        ),
        (
            ["ip6tables-nft-restore", "--noflush"],
            IPTABLES.format(table="filter"),
            {"dataplane": "iptables-nft", "family": "ipv6", "table": "filter"},
        ),
        (
            ["iptables-legacy-restore", "--noflush"],
            IPTABLES.format(table="nat"),
            {"dataplane": "iptables-legacy", "family": "ipv4", "table": "nat"},
        ),
        (
            ["ip6tables-legacy-restore", "--noflush"],
            IPTABLES.format(table="mangle"),
            {"dataplane": "iptables-legacy", "family": "ipv6", "table": "mangle"},
        ),
    ],
)
def test_real_tools_are_seen(
    watch: Watch, namespace: Namespace, argv: list[str], text: str, labels: dict[str, str]
) -> None:
    """Each tool's run is one committed rewrite of its data plane, family and table."""
    bench = watch()
    assert tool(namespace, argv, text) == 0
    bench.settle()
    assert bench.outcomes(**labels) == {"committed": 1} == bench.outcomes()
    assert {
        row["object"] for row, _ in bench.rows("kptrace_ruleset_objects") if labels.items() <= row.items()
    }


def test_pyroute2_is_seen(watch: Watch, namespace: Namespace) -> None:
    """A writer that talks netlink itself is seen like the tools."""
    bench = watch()

    def write() -> None:
        from pyroute2.nftables.main import NFTables

        with NFTables(nfgen_family=batches.IPV4) as nft:
            nft.table("add", name="snake")

    namespace.call(write)
    bench.settle()
    assert "snake" in tables(namespace)
    assert bench.outcomes(table="snake").get("committed") == 1


def test_a_refused_legacy_table_is_failed(watch: Watch, namespace: Namespace) -> None:
    """A legacy replacement that the kernel refuses is a failed rewrite and changes no size."""
    bench = watch()

    def write() -> None:
        with (
            socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw,
            pytest.raises(OSError, match=r"Invalid argument|No such"),
        ):
            raw.setsockopt(socket.SOL_IP, 64, b"filter".ljust(96, b"\0"))

    namespace.call(write)
    bench.settle()
    assert bench.outcomes(dataplane="iptables-legacy", table="filter") == {"failed": 1}
    assert bench.value("kptrace_ruleset_objects") == 0


def test_legacy_entries_are_what_the_table_has(watch: Watch, namespace: Namespace) -> None:
    """The entries of a legacy table are known at the start as after a replacement: rules, policies, chains, the end."""
    text = IPTABLES.format(table="filter")
    assert tool(namespace, ["iptables-legacy-restore"], text) == 0
    entries = {"dataplane": "iptables-legacy", "table": "filter", "object": "entry"}
    bench = watch()
    # 3 policies, 2 rules, the chain's head and end, the table's end.
    assert bench.value("kptrace_ruleset_objects", **entries) == 8
    assert tool(namespace, ["iptables-legacy", "-A", "KUBE-X", "-j", "DROP"]) == 0
    bench.settle()
    assert bench.value("kptrace_ruleset_objects", **entries) == 9


@pytest.mark.parametrize(("argv", "call"), [("nft", "sendmsg"), ("iptables-legacy-restore", "setsockopt")])
def test_the_interval_lies_inside_straces(watch: Watch, namespace: Namespace, argv: str, call: str) -> None:
    """Begin and end lie between the moments at which strace saw the system call's entry and exit."""
    bench = watch()
    text = (
        "add table ip t\nadd chain ip t c\n" + "add rule ip t c ip daddr 192.0.2.1 counter\n" * 500
        if argv == "nft"
        else IPTABLES.format(table="filter")
    )
    before = offset_ns()
    trace = namespace.call(
        lambda: (
            subprocess.run(
                ["strace", "-ttt", "-T", argv, *(["-f", "-"] if argv == "nft" else [])],
                input=text,
                text=True,
                capture_output=True,
                check=True,
            ).stderr
        )
    )
    offset, error = offset_ns()
    slack = error + before[1] + abs(offset - before[0]) + 2_000  # strace prints whole microseconds
    bench.settle()
    (rewrite,) = bench.commits
    begin, end = rewrite.begin_ns + offset, rewrite.end_ns + offset
    # strace writes down an entry's time before it decodes the arguments, and -T counts from after that: the exit lies
    # before the next line's time.
    lines = [line.partition(" ") for line in trace.splitlines() if re.match(r"\d+\.\d{6} ", line)]
    times = [int(stamp.replace(".", "")) * 1000 for stamp, _, _ in lines]
    enclosing = [
        line
        for (_, _, line), low, high in zip(lines, times, times[1:], strict=False)
        if line.startswith(f"{call}(") and low - slack <= begin and end <= high + slack
    ]
    assert len(enclosing) == 1, (
        begin,
        end,
        [(low, line[:40]) for low, (_, _, line) in zip(times, lines, strict=True)],
    )
    took = re.search(r"<(\d+)\.(\d{6})>$", enclosing[0])
    assert took
    assert end - begin <= int(took[1] + took[2]) * 1000 + 1_000


def offset_ns() -> tuple[int, int]:
    """CLOCK_REALTIME minus CLOCK_MONOTONIC, and how far that may be off."""
    best = (0, 1 << 62)
    for _ in range(1000):
        low = time.monotonic_ns()
        real = time.time_ns()
        high = time.monotonic_ns()
        best = min(best, (real - (low + high) // 2, (high - low) // 2 + 1), key=lambda pair: pair[1])
    return best


def program(folder: Path, name: str) -> Path:
    """A script of this name that runs nft as its child."""
    path = folder / name
    path.write_text("#!/bin/sh\nnft -f -\nexit $?\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("name", "writer"), [("kube-proxy", "kube-proxy"), ("calico-node", "calico-node"), ("mine", "other")]
)
def test_the_writer_is_the_parent(
    watch: Watch, namespace: Namespace, tmp_path: Path, name: str, writer: str
) -> None:
    """A rewrite by nft is its parent's, by the parent's executable, though both are gone when it is accounted for."""
    bench = watch()
    assert tool(namespace, [str(program(tmp_path, name))], "add table ip t\n") == 0
    bench.settle()
    assert bench.outcomes(writer=writer) == {"committed": 1} == bench.outcomes()
    assert bench.commits[0].run.executable.endswith("/nft")


def test_another_namespace_is_one_counter(watch: Watch, namespace: Namespace, tmp_path: Path) -> None:
    """A program named kube-proxy in a pod-like namespace changes one counter, and no series of the node's."""
    bench = watch()
    before = {name: bench.rows(name) for name in ("kptrace_ruleset_objects", "kptrace_ruleset_generation")}
    with Namespace("pod") as pod:
        assert tool(pod, [str(program(tmp_path, "kube-proxy"))], "add table ip kube-proxy\n") == 0
        assert tool(pod, ["iptables-legacy-restore"], IPTABLES.format(table="nat")) == 0
        bench.settle()
    assert bench.outcomes() == {}
    assert bench.value("kptrace_rewrite_other_netns_total") == 2
    assert {name: bench.rows(name) for name in before} == before


def test_a_name_makes_nobody_kube_proxy(watch: Watch, namespace: Namespace) -> None:
    """A thread may call itself kube-proxy: its executable says otherwise."""
    bench = watch()

    def write() -> None:
        Path("/proc/thread-self/comm").write_text("kube-proxy")
        with batches.open_socket() as channel:
            channel.send(batches.batch(batches.new_table("t")))

    namespace.call(write)
    bench.settle()
    assert bench.outcomes(writer="other") == {"committed": 1} == bench.outcomes()
    assert bench.commits[0].netns == bench.netns.inode


def test_the_socket_s_namespace_counts(watch: Watch, namespace: Namespace) -> None:
    """A socket of the watched namespace writes there, wherever its sender is meanwhile; the sender then has no name."""
    bench = watch()
    with namespace.call(batches.open_socket) as channel:
        channel.send(batches.batch(batches.new_table("afar")))
    bench.settle()
    assert "afar" in tables(namespace)
    assert bench.outcomes(writer="other", table="afar") == {"committed": 1}
    assert bench.value("kptrace_rewrite_other_netns_total") == 0


def test_inherited_sockets_are_seen(watch: Watch, namespace: Namespace) -> None:
    """A process that never opened the socket it writes to, and one that opened it before kptrace began, are seen."""
    channel = namespace.call(batches.open_socket)
    bench = watch()
    with channel:
        data = batches.batch(batches.new_table("inherited"))
        child = os.fork()
        if not child:
            os.write(channel.fileno(), data)
            os._exit(0)
        os.waitpid(child, 0)
    bench.settle()
    assert bench.outcomes(table="inherited") == {"committed": 1}


def test_concurrent_writers_keep_their_outcomes(watch: Watch, namespace: Namespace) -> None:
    """Writers that run at the same time, some failing, some in another namespace, are each told for what they are."""
    bench = watch()
    rounds = 40

    def commits(prefix: str) -> None:
        for step in range(rounds):
            send(namespace, batches.batch(batches.new_table(f"{prefix}{step % 8}x{step}")))

    def failures() -> None:
        for _ in range(rounds):
            send(namespace, batches.batch(batches.delete_chain("none", "none")))

    with Namespace("pod") as pod:

        def elsewhere() -> None:
            for step in range(rounds):
                send(pod, batches.batch(batches.new_table(f"p{step}")))

        jobs = [threading.Thread(target=commits, args=(prefix,)) for prefix in "ab"]
        jobs += [threading.Thread(target=failures), threading.Thread(target=elsewhere)]
        for job in jobs:
            job.start()
        for job in jobs:
            job.join()
        bench.settle()
    assert bench.outcomes() == {"committed": 2 * rounds, "failed": rounds}
    assert bench.value("kptrace_rewrite_other_netns_total") == rounds
    bench.settle()
    assert bench.lost("untraced_commit") == 0
    assert (
        sum(bench.lost(reason) for reason in ("ring_full", "running_full", "unreadable", "undecodable")) == 0
    )
    assert len({row["table"] for row, _ in bench.rows("kptrace_rewrite_duration_seconds")}) <= 33 + 2


def test_a_long_rewrite_is_seen_while_it_runs(watch: Watch, namespace: Namespace, tmp_path: Path) -> None:
    """While a transaction runs its writer's gauge grows, and it is 0 again afterwards."""
    bench = watch()
    path = tmp_path / "rules"
    rules = "".join(
        f"add rule ip t c ip daddr 10.0.{n // 256}.{n % 256} tcp dport 80 counter\n" for n in range(20_000)
    )
    path.write_text(f"add table ip t\nadd chain ip t c\n{rules}")
    kube_proxy = str(program(tmp_path, "kube-proxy"))
    rounds, longest = 0, 0.0
    # It takes a tenth of a second; on a busy machine the test may sleep through that.
    while not longest and rounds < 5:
        rounds += 1
        tool(namespace, ["nft", "flush", "ruleset"])
        process = namespace.popen([kube_proxy], stdin=True)
        assert process.stdin
        process.stdin.write(path.read_text())
        process.stdin.close()
        while process.poll() is None:
            bench.settle()
            longest = max(longest, bench.value("kptrace_rewrite_running_seconds", writer="kube-proxy"))
    bench.settle()
    assert longest > 0
    assert bench.value("kptrace_rewrite_running_seconds") == 0
    assert bench.outcomes(writer="kube-proxy") == {"committed": rounds}
    assert bench.value("kptrace_rewrite_truncated_total", dataplane="nftables") == rounds
    bench.until(lambda: bench.value("kptrace_ruleset_objects_exact") == 1)
    assert bench.value("kptrace_ruleset_objects", table="t", object="rule") == 20_000


def test_base_chains_are_told_of(watch: Watch, namespace: Namespace) -> None:
    """Commits that may add or remove base chains say so, others do not."""
    bench = watch()
    for text, told in [
        ("add table ip t", True),
        ("add chain ip t c { type filter hook output priority 0; }", True),
        ("add chain ip t plain", False),
        ("add rule ip t c counter", False),
        ("delete chain ip t plain", False),
        ("flush chain ip t c", False),
        ("delete chain ip t c", True),
    ]:
        assert tool(namespace, ["nft", text]) == 0
        bench.settle()
        assert (BASE_CHAINS in bench.commits[-1].details) is told, text


def test_nothing_stays_behind(bytecode: Bytecode, namespace: Namespace) -> None:
    """Closing detaches: no program of the signal is left."""
    names = ("exit_rewrite", "enter_sendmsg")
    before = program_ids(names)
    bench = RewriteBench(bytecode, namespace)
    own = program_ids(names) - before
    assert len(own) == len(names)
    bench.close()
    deadline = time.monotonic() + 10
    while (left := program_ids(names) & own) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not left
