# SPDX-License-Identifier: Apache-2.0
"""Sizes of the installed rules: when they are dumped, how they follow commits, and that both stay bounded."""

import errno
import struct
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import pytest

from kptrace.kernel.netns import NetworkNamespace
from kptrace.model.netfilter import IpFamily
from kptrace.signals import rewrite_objects
from kptrace.signals.rewrite_labels import MAX_FOREIGN, TableNames
from kptrace.signals.rewrite_objects import (
    LEAST_SECONDS,
    RETRY_SECONDS,
    SLOW_SECONDS,
    Row,
    RulesetObjects,
)
from kptrace.signals.rewrite_records import Flag, Kind, Transaction
from tests.unit.dataplanes.wire import attribute, batch, done, message, name, nft, number

NEWTABLE, GETTABLE, NEWCHAIN, GETCHAIN, NEWRULE, GETRULE = 0, 1, 3, 4, 6, 7
NEWSET, GETSET, NEWSETELEM, GETSETELEM, NEWGEN, GETGEN = 9, 10, 12, 13, 15, 16
INTERRUPTED = 0x10
KUBE_PROXY = ("nftables", "ipv4", "kube-proxy")


def of_table(
    operation: int, *more: bytes, table: str = "kube-proxy", family: int = 2, flags: int = 0
) -> bytes:
    """A message about one table."""
    return nft(operation, name(1, table), *more, family=family, flags=flags)


def table_of(table: str, family: int = 2) -> bytes:
    """A table as a dump has it."""
    return nft(NEWTABLE, name(1, table), family=family)


@dataclass
class Ruleset:
    """What nf_tables answers: one table with a base chain, a chain of two rules and a set of two elements.

    Attributes:
        objects: answers by the request's operation.
        generation: of the ruleset.
        interruptions: how many dumps of chains are still to be interrupted, after their first datagram.
        refusal: an errno that every dump is answered with.
        dumps: how many whole dumps were begun.
        channels: sockets that were opened and not closed.
    """

    objects: dict[int, list[bytes]] = field(
        default_factory=lambda: {
            GETTABLE: [table_of("kube-proxy")],
            GETCHAIN: [
                of_table(NEWCHAIN, name(3, "filter-input"), attribute(4, number(1, 1) + number(2, 0))),
                of_table(NEWCHAIN, name(3, "services")),
            ],
            GETRULE: [of_table(NEWRULE, name(2, "services")), of_table(NEWRULE, name(2, "services"))],
            GETSET: [of_table(NEWSET, name(2, "ips"), number(3, 0))],
            GETSETELEM: [
                of_table(
                    NEWSETELEM,
                    name(2, "ips"),
                    attribute(3, b"".join(attribute(1, attribute(1, number(1, n))) for n in range(2))),
                )
            ],
        }
    )
    generation: int = 7
    interruptions: int = 0
    refusal: int = 0
    dumps: int = 0
    channels: list["Channel"] = field(default_factory=list)

    def open(self) -> "Channel":
        """Open a socket."""
        channel = Channel(self)
        self.channels.append(channel)
        return channel


class Channel:
    """A socket of nfnetlink: as the kernel's, it goes on with a dump while it is read, and refuses another until the end."""

    def __init__(self, ruleset: Ruleset) -> None:
        self.ruleset = ruleset
        self.queue: deque[bytes] = deque()
        self.dump: deque[bytes] = deque()

    def send(self, data: bytes, /) -> int:
        """Answer a request."""
        _, kind, _, sequence = struct.unpack_from("=IHHI", data)
        operation = kind & 0xFF
        if operation == GETGEN:
            self.queue.append(nft(NEWGEN, number(1, self.ruleset.generation), sequence=sequence))
            return len(data)
        self.ruleset.dumps += operation == GETTABLE
        if code := errno.EBUSY if self.dump else self.ruleset.refusal:
            self.queue.append(done(sequence, -code, kind=2))
            return len(data)
        flags = 0
        if operation == GETCHAIN and self.ruleset.interruptions:
            self.ruleset.interruptions -= 1
            flags = INTERRUPTED
        items = [
            each[:8] + struct.pack("=I", sequence) + each[12:] for each in self.ruleset.objects[operation]
        ]
        # One object a datagram; a dump that is interrupted says so in each after the first, and has many to come.
        many = items * 20 if flags else items
        marked = many[:1] + [each[:6] + struct.pack("=H", flags) + each[8:] for each in many[1:]]
        self.dump.extend([*marked, done(sequence, 0, flags)])
        self.queue.append(self.dump.popleft())
        return len(data)

    def recv(self, size: int, /) -> bytes:
        """Give the next datagram, and prepare the dump's next."""
        datagram = self.queue.popleft()
        if self.dump:
            self.queue.append(self.dump.popleft())
        assert len(datagram) <= size
        return datagram

    def close(self) -> None:
        """Close."""
        self.ruleset.channels.remove(self)


class Here:
    """A network namespace that is the test's own."""

    inode = 1

    @contextmanager
    def enter(self) -> Iterator[None]:
        """Do nothing."""
        yield


@dataclass
class Loop:
    """A loop whose callbacks the test runs; counts them."""

    waiting: deque[Callable[[], None]] = field(default_factory=deque)

    def call_later(self, seconds: float, callback: Callable[[], None]) -> None:
        """Keep it."""
        assert seconds > 0
        self.waiting.append(callback)

    def run(self) -> None:
        """Call all that wait, and what they ask for."""
        while self.waiting:
            self.waiting.popleft()()


@dataclass
class Bench:
    """The sizes of a ruleset that answers as the test says, by a clock that the test moves."""

    ruleset: Ruleset
    exact_sequence: bool = True
    now: float = 1000.0
    loop: Loop = field(default_factory=Loop)
    objects: RulesetObjects = field(init=False)

    def __post_init__(self) -> None:
        """Open it."""
        self.objects = RulesetObjects(
            cast(NetworkNamespace, Here()),
            self.loop,
            TableNames(),
            exact_sequence=self.exact_sequence,
            clock=lambda: self.now,
        )

    def tick(self, seconds: float = 0.0) -> int:
        """Let time pass, tick, and let the loop run; returns dumps that were begun."""
        before = self.ruleset.dumps
        self.now += seconds
        self.objects.tick()
        self.loop.run()
        return self.ruleset.dumps - before

    def sizes(self) -> tuple[int, int, int, int]:
        """Chains, rules, sets and elements of kube-proxy's table."""
        rows = self.objects.rows()
        return (
            rows[*KUBE_PROXY, "chain"],
            rows[*KUBE_PROXY, "rule"],
            rows[*KUBE_PROXY, "set"],
            rows[*KUBE_PROXY, "element"],
        )


@pytest.fixture
def proc_net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The namespace's procfs folder, without legacy tables."""
    monkeypatch.setattr(rewrite_objects, "_PROC_NET", tmp_path)
    return tmp_path


@pytest.fixture
def ruleset(proc_net: Path, monkeypatch: pytest.MonkeyPatch) -> Ruleset:
    """What the sockets that are opened meanwhile talk to."""
    assert proc_net.is_dir()
    made = Ruleset()
    monkeypatch.setattr(rewrite_objects, "open_channel", made.open)
    return made


def commit(
    *messages: bytes, sequence: int = 8, begin_ns: int = 1 << 62, end_ns: int = 1 << 62
) -> Transaction:
    """A committed batch that left the ruleset at this generation."""
    data = batch(*messages)
    return Transaction(
        kind=Kind.FLAT,
        tgid=1,
        tid=1,
        flags=Flag(0),
        begin_ns=begin_ns,
        end_ns=end_ns,
        result=0,
        cgroup_id=0,
        netns=1,
        task_netns=1,
        mntns=1,
        sequence_begin=sequence - 1,
        sequence_end=sequence,
        answers=0,
        error=0,
        parents=(),
        comm="",
        size=len(data),
        tail=b"",
        data=data,
    )


RULE = of_table(NEWRULE, name(2, "services"), flags=1)


def test_nothing_is_known_before_the_first_tick(ruleset: Ruleset) -> None:
    """Making it reads nothing; unknown tables are unknown, not without base chains."""
    bench = Bench(ruleset)
    assert ruleset.dumps == 0
    assert not bench.objects.exact
    assert bench.objects.rows() == {}
    assert bench.objects.base_chains(2, "kube-proxy") is None


def test_the_first_tick_reads_the_ruleset(ruleset: Ruleset) -> None:
    """Chains, rules, sets and elements by table, and its base chains."""
    bench = Bench(ruleset)
    assert bench.tick() == 1
    assert bench.sizes() == (2, 2, 1, 2)
    assert bench.objects.exact
    assert bench.objects.dumps == 1
    assert bench.objects.base_chains(2, "kube-proxy") == frozenset({"filter-input"})
    assert bench.objects.base_chains(2, "other") is None


def test_exact_sizes_are_not_read_again(ruleset: Ruleset) -> None:
    """While every commit is followed there is nothing that a dump would tell."""
    bench = Bench(ruleset)
    bench.tick()
    assert [bench.tick(SLOW_SECONDS) for _ in range(5)] == [0] * 5


def test_sets_that_change_by_themselves_are_read_slowly(ruleset: Ruleset) -> None:
    """Their elements come and go without a batch: a dump every few minutes tells."""
    ruleset.objects[GETSET] = [of_table(NEWSET, name(2, "ips"), number(3, 0x10))]
    bench = Bench(ruleset)
    bench.tick()
    assert bench.tick(SLOW_SECONDS - 1) == 0
    assert bench.tick(1) == 1
    assert bench.tick(LEAST_SECONDS) == 0


def test_doubtful_sizes_are_read_again_but_not_at_once(ruleset: Ruleset) -> None:
    """A flood of commits that cannot be followed makes no more than a dump each so many seconds."""
    bench = Bench(ruleset)
    bench.tick()
    bench.objects.doubt()
    assert not bench.objects.exact
    assert bench.tick(LEAST_SECONDS - 1) == 0
    assert bench.tick(1) == 1
    assert bench.objects.exact
    begun = 0
    for _ in range(1000):
        bench.objects.doubt()
        begun += bench.tick(LEAST_SECONDS / 10)
    assert begun <= 100


def test_doubt_before_the_first_dump_is_none(ruleset: Ruleset) -> None:
    """What is not known cannot become doubtful, and the first dump is taken for true."""
    bench = Bench(ruleset)
    bench.objects.doubt()
    bench.objects.committed(commit(RULE), whole=True)
    bench.tick()
    assert bench.objects.exact
    assert bench.sizes() == (2, 2, 1, 2)


def test_dear_dumps_are_rare(ruleset: Ruleset, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time until the next follows the processor time that the last one took."""
    monkeypatch.setattr(rewrite_objects, "COST_SHARE", 1e-12)
    bench = Bench(ruleset)
    bench.tick()
    assert bench.objects._due > bench.now + 100 * LEAST_SECONDS
    bench.objects.doubt()
    assert bench.tick(100 * LEAST_SECONDS) == 0


@pytest.mark.parametrize("interruptions", [1, 3])
def test_an_interrupted_dump_is_begun_again(ruleset: Ruleset, interruptions: int) -> None:
    """Nothing of it is taken over, and the next try, soon after, is not refused for the one that was given up."""
    ruleset.interruptions = interruptions
    bench = Bench(ruleset)
    for _ in range(interruptions):
        assert bench.tick() == 1
        assert bench.objects.rows() == {}
        assert not bench.objects.exact
        assert bench.tick(RETRY_SECONDS / 2) == 0
        bench.now += RETRY_SECONDS * 100
    assert bench.tick() == 1
    assert bench.objects.exact
    assert bench.sizes() == (2, 2, 1, 2)
    assert len(ruleset.channels) == 1


def test_a_commit_during_the_dump_interrupts_it(ruleset: Ruleset, monkeypatch: pytest.MonkeyPatch) -> None:
    """The generation before and after must be the same: otherwise the old sizes stay until it is."""
    bench = Bench(ruleset)
    answer = Channel.send

    def send_and_move(channel: Channel, data: bytes, /) -> int:
        ruleset.generation += data[4] == GETRULE
        return answer(channel, data)

    with monkeypatch.context() as patch:
        patch.setattr(Channel, "send", send_and_move)
        bench.tick()
    assert not bench.objects.exact
    assert bench.tick(100 * RETRY_SECONDS) == 1
    assert bench.objects.exact


def test_a_refused_dump_is_not_repeated_at_once(ruleset: Ruleset) -> None:
    """An error that is nobody's commit costs as much as a dump may, and the sizes stay what they were."""
    bench = Bench(ruleset)
    bench.tick()
    bench.objects.doubt()
    ruleset.refusal = errno.EPERM
    assert bench.tick(LEAST_SECONDS) == 1
    assert bench.sizes() == (2, 2, 1, 2)
    assert not bench.objects.exact
    assert bench.tick(2.0) == 0
    ruleset.refusal = 0
    assert bench.tick(LEAST_SECONDS) == 1
    assert bench.objects.exact


def test_a_set_that_is_gone_meanwhile_interrupts_the_dump(ruleset: Ruleset) -> None:
    """Its elements are asked for after its name was read."""
    gone = done(0, -errno.ENOENT, kind=2)
    listed, ruleset.objects[GETSETELEM] = ruleset.objects[GETSETELEM], [gone]
    bench = Bench(ruleset)
    bench.tick()
    assert not bench.objects.exact
    ruleset.objects[GETSETELEM] = listed
    bench.tick(100 * RETRY_SECONDS)
    assert bench.objects.exact


def test_commits_are_followed_one_by_one(ruleset: Ruleset) -> None:
    """Each next generation's batch is taken in; the sizes stay exact and nothing is dumped."""
    bench = Bench(ruleset)
    bench.tick()
    for sequence in range(8, 20):
        bench.objects.committed(commit(RULE, sequence=sequence), whole=True)
    assert bench.sizes() == (2, 14, 1, 2)
    assert bench.objects.exact
    assert bench.tick(SLOW_SECONDS) == 0


def test_commits_that_a_dump_has_already_are_not_taken_twice(ruleset: Ruleset) -> None:
    """A record that waited while the ruleset was read tells of what was read."""
    bench = Bench(ruleset)
    bench.tick()
    for sequence in (5, 6, 7, 2**32 - 3):
        bench.objects.committed(commit(RULE, sequence=sequence), whole=True)
    assert bench.sizes() == (2, 2, 1, 2)
    assert bench.objects.exact


@pytest.mark.parametrize(
    ("sequence", "whole"), [(9, True), (8, False), (1000, True)], ids=["gap", "cut", "far"]
)
def test_what_cannot_be_followed_makes_sizes_inexact(ruleset: Ruleset, sequence: int, whole: bool) -> None:
    """A missing generation or a cut copy is not guessed at: the old numbers stay until the next dump."""
    bench = Bench(ruleset)
    bench.tick()
    bench.objects.committed(commit(RULE, sequence=sequence), whole=whole)
    assert not bench.objects.exact
    assert bench.sizes() == (2, 2, 1, 2)
    bench.objects.committed(commit(RULE, sequence=sequence), whole=True)
    assert bench.sizes() == (2, 2, 1, 2)
    assert bench.tick(LEAST_SECONDS) == 1
    assert bench.objects.exact


@pytest.mark.parametrize(
    ("begin_ns", "end_ns", "rules", "exact"),
    [(0, 1, 2, True), (1 << 62, 1 << 62, 3, True), (0, 1 << 62, 2, False)],
    ids=["before", "after", "meanwhile"],
)
def test_one_bit_leaves_time_to_tell(
    ruleset: Ruleset, begin_ns: int, end_ns: int, rules: int, exact: bool
) -> None:
    """Without the generation a commit is in the dump if it ended before, not if it began after; else nobody knows."""
    bench = Bench(ruleset, exact_sequence=False)
    bench.tick()
    bench.objects.committed(commit(RULE, sequence=1, begin_ns=begin_ns, end_ns=end_ns), whole=True)
    assert bench.sizes() == (2, rules, 1, 2)
    assert bench.objects.exact is exact


def test_legacy_tables_are_counted_by_entries(
    ruleset: Ruleset, proc_net: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that are there, by what the kernel says of each; a replacement tells its new number."""
    (proc_net / "ip_tables_names").write_text("nat\nfilter\n")
    (proc_net / "ip6_tables_names").write_text("nat\nmine\n")
    known = {(IpFamily.IPV4, "nat"): 12, (IpFamily.IPV4, "filter"): 4, (IpFamily.IPV6, "nat"): 5}
    monkeypatch.setattr(rewrite_objects, "table_entries", lambda *place: known.get(place))
    bench = Bench(ruleset)
    bench.tick()

    def entries() -> dict[Row, int]:
        return {row: count for row, count in bench.objects.rows().items() if row[3] == "entry"}

    expected: dict[Row, int] = {
        ("iptables-legacy", "ipv4", "nat", "entry"): 12,
        ("iptables-legacy", "ipv4", "filter", "entry"): 4,
        ("iptables-legacy", "ipv6", "nat", "entry"): 5,
    }
    assert entries() == expected
    bench.objects.replaced(IpFamily.IPV4, "nat", 8008)
    assert entries() == expected | {("iptables-legacy", "ipv4", "nat", "entry"): 8008}


def test_without_nfnetlink_there_are_legacy_tables_only(
    proc_net: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel without nf_tables is asked for its legacy tables now and then, and for nothing else."""

    def refuse() -> Channel:
        raise OSError(errno.EPROTONOSUPPORT, "Protocol not supported")

    (proc_net / "ip_tables_names").write_text("nat\n")
    asked: list[object] = []

    def table_entries(family: IpFamily, table: str) -> int:
        asked.append((family, table))
        return 3

    monkeypatch.setattr(rewrite_objects, "table_entries", table_entries)
    monkeypatch.setattr(rewrite_objects, "open_channel", refuse)
    bench = Bench(Ruleset())
    bench.tick()
    bench.tick(SLOW_SECONDS - 1)
    assert bench.objects.rows() == {("iptables-legacy", "ipv4", "nat", "entry"): 3}
    assert not bench.objects.exact
    assert len(asked) == 1
    bench.tick(1)
    assert len(asked) == 2


def test_rows_are_by_data_plane_and_family(ruleset: Ruleset) -> None:
    """Tables called like iptables' are iptables-nft's, unless their base chains are not; unknown families are other."""
    ruleset.objects = {
        **{operation: [] for operation in (GETRULE, GETSET)},
        GETTABLE: [table_of("nat"), table_of("nat", 10), table_of("filter", 1), table_of("x", 99)],
        GETCHAIN: [
            of_table(NEWCHAIN, name(3, "mine"), attribute(4, number(1, 1)), table="nat", family=10),
        ],
    }
    bench = Bench(ruleset)
    bench.tick()
    assert {row[:3] for row in bench.objects.rows()} == {
        ("iptables-nft", "ipv4", "nat"),
        ("nftables", "ipv6", "nat"),
        ("nftables", "inet", "filter"),
        ("nftables", "other", "x"),
    }


def test_ten_thousand_tables_are_few_rows(ruleset: Ruleset) -> None:
    """Foreign tables beyond the bound are added up in one: nothing is lost, no more series are made."""
    ruleset.objects = {
        **{operation: [] for operation in (GETRULE, GETSET)},
        GETTABLE: [table_of(f"t{n}") for n in range(10_000)],
        GETCHAIN: [of_table(NEWCHAIN, name(3, "c"), table=f"t{n}") for n in range(10_000)],
    }
    bench = Bench(ruleset)
    bench.tick()
    rows = bench.objects.rows()
    assert len(rows) == 4 * (MAX_FOREIGN + 1)
    assert sum(count for row, count in rows.items() if row[3] == "chain") == 10_000


def test_rows_are_made_once_for_many_scrapes(ruleset: Ruleset) -> None:
    """They are counted anew only after something changed."""
    bench = Bench(ruleset)
    bench.tick()
    first = bench.objects.rows()
    assert bench.objects.rows() is first
    bench.objects.committed(commit(RULE), whole=True)
    assert bench.objects.rows() is not first


def test_closing_ends_a_dump_that_is_under_way(ruleset: Ruleset, monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits in the loop does nothing any more, no socket stays open, and closing twice is no harm."""
    monkeypatch.setattr(rewrite_objects, "SLICE_SECONDS", -1.0)  # every step waits for the loop
    bench = Bench(ruleset)
    bench.objects.tick()
    assert len(bench.loop.waiting) == 1
    bench.objects.tick()
    assert len(bench.loop.waiting) == 1
    bench.objects.close()
    bench.objects.close()
    bench.loop.run()
    assert bench.tick(SLOW_SECONDS) == 0
    assert ruleset.channels == []
    assert bench.objects.dumps == 0


def test_the_ruleset_under_test_refuses_as_the_kernel_does() -> None:
    """A second dump on a socket whose first was not read to its end is refused: what the tests above rest on."""
    ruleset = Ruleset()
    channel = ruleset.open()
    request = message(10 << 8 | GETCHAIN, family=0, sequence=1)
    channel.send(request)
    channel.send(message(10 << 8 | GETTABLE, family=0, sequence=2))
    answers = [channel.recv(1 << 16) for _ in range(len(channel.queue) + len(channel.dump))]
    codes = [int.from_bytes(each[16:20], sys.byteorder, signed=True) for each in answers if each[4] == 2]
    assert codes == [-errno.EBUSY]
