# SPDX-License-Identifier: Apache-2.0
"""From a record to a rewrite: what it changed, how it ended, who wrote it, and who is told of it."""

import struct
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kptrace.dataplanes.nftables.batch import TAIL_BYTES
from kptrace.model.netfilter import DataPlane, IpFamily
from kptrace.model.rewrite import ObjectCount, Outcome, ProcessRun, Rewrite
from kptrace.signals.process_records import Exec
from kptrace.signals.processes import ProcessTable
from kptrace.signals.rewrite_labels import NONE, SEVERAL
from kptrace.signals.rewrite_records import Flag, Kind, Transaction
from kptrace.signals.rewrite_reduce import BASE_CHAINS, Reducer
from kptrace.signals.writers import Writers
from tests.unit.dataplanes.wire import attribute, batch, name, nft, number

WATCHED, POD = 100, 200
IPV4, IPV6 = 2, 10
NO_FLAGS = Flag(0)
NEWTABLE, DELTABLE, NEWCHAIN, DELCHAIN, NEWRULE = 0, 2, 3, 5, 6
HOOK = attribute(4, number(1, 1) + number(2, 0))


@dataclass
class Ruleset:
    """What is installed, and what was told: `Installed` without a kernel.

    Attributes:
        base: base chains by (nfproto, table).
        told: calls, in order.
    """

    base: dict[tuple[int, str], frozenset[str]] = field(default_factory=dict)
    told: list[tuple[object, ...]] = field(default_factory=list)

    def base_chains(self, nfproto: int, table: str) -> frozenset[str] | None:
        """Names of a table's base chains."""
        return self.base.get((nfproto, table))

    def committed(self, transaction: Transaction, *, whole: bool) -> None:
        """A batch that deletes everything, so that nothing can be asked any more."""
        self.told.append(("committed", transaction.data, whole))
        self.base.clear()

    def replaced(self, family: IpFamily, table: str, entries: int) -> None:
        """A legacy table."""
        self.told.append(("replaced", family, table, entries))

    def doubt(self) -> None:
        """Something nobody followed."""
        self.told.append(("doubt",))


def reducer(
    ruleset: Ruleset | None = None, *processes: Exec, exact: bool = True, cgroup: str = ""
) -> Reducer:
    """A reducer that knows these processes."""
    table = ProcessTable(lambda _: None)
    for each in processes:
        table.apply(each, 0.0)
    return Reducer(
        watched=WATCHED,
        exact_sequence=exact,
        installed=ruleset or Ruleset(),
        processes=table,
        writers=Writers(),
        cgroup=lambda _: cgroup,
    )


def sent(
    *messages: bytes,
    data: bytes | None = None,
    kind: Kind = Kind.FLAT,
    moved: bool = True,
    size: int | None = None,
    flags: Flag = NO_FLAGS,
    error: int = 0,
    result: int = 0,
    task_netns: int = WATCHED,
    parents: tuple[int, ...] = (),
    tail: bytes = b"",
) -> Transaction:
    """The record of a batch, by default of process 7 and committed alone."""
    copy = batch(*messages) if data is None else data
    return Transaction(
        kind=kind,
        tgid=7,
        tid=8,
        flags=flags,
        begin_ns=1000,
        end_ns=3000,
        result=result,
        cgroup_id=77,
        netns=WATCHED,
        task_netns=task_netns,
        mntns=1,
        sequence_begin=41,
        sequence_end=42 if moved else 41,
        answers=0,
        error=error,
        parents=parents,
        comm="writer",
        size=len(copy) if size is None else size,
        tail=tail,
        data=copy,
    )


def rewrite(record: Transaction, ruleset: Ruleset | None = None, *processes: Exec) -> Rewrite:
    """What becomes of a record."""
    found = reducer(ruleset, *processes).rewrite(record)
    assert found is not None
    return found


def began(tgid: int, executable: str, parent: int = 0) -> Exec:
    """An exec record."""
    return Exec(tgid, 1, 2, (parent,), WATCHED, 4, "name", executable)


def request(operation: int, table: str, *more: bytes, family: int = IPV4) -> bytes:
    """A request about one table."""
    return nft(operation, name(1, table), *more, family=family, flags=1)


def replacement(table: bytes = b"nat", entries: int = 8) -> bytes:
    """A `struct ipt_replace`."""
    return struct.pack("=32s3I5I5II", table, 0b11011, entries, 3000, *range(10), 5)


RULE = request(NEWRULE, "kube-proxy", name(2, "services"))


def test_a_committed_batch_becomes_a_rewrite() -> None:
    """Every field comes from the record, its bytes or the process."""
    record = sent(RULE, RULE)
    ruleset = Ruleset({(IPV4, "kube-proxy"): frozenset({"filter-input"})})
    assert rewrite(record, ruleset, began(7, "/usr/local/bin/kube-proxy")) == Rewrite(
        dataplane=DataPlane.NFTABLES,
        family="ipv4",
        table="kube-proxy",
        writer="kube-proxy",
        run=ProcessRun(7, 0, 1, "name", "/usr/local/bin/kube-proxy", 2),
        begin_ns=1000,
        end_ns=3000,
        size=len(record.data),
        outcome=Outcome.COMMITTED,
        objects=(ObjectCount("ipv4", "kube-proxy", "rule", "add", 2),),
        netns=WATCHED,
        generation=42,
    )
    assert ruleset.told == [("committed", record.data, True)]


@pytest.mark.parametrize(
    ("record", "outcome", "told"),
    [
        (sent(RULE, error=-2), Outcome.FAILED, []),
        (sent(RULE, result=-105), Outcome.FAILED, []),
        (sent(data=batch(RULE, end=False)), Outcome.CHECKED, []),
        (sent(), Outcome.EMPTY, []),
        (sent(RULE, moved=False), Outcome.EMPTY, []),
        (sent(RULE, moved=False, flags=Flag.SEVERAL), Outcome.UNKNOWN, [("doubt",)]),
        (sent(data=b"", size=5000, flags=Flag.UNREAD, moved=False), Outcome.UNKNOWN, [("doubt",)]),
    ],
    ids=["refused", "not-sent", "checked", "nothing", "unchanged", "several", "unread"],
)
def test_only_commits_are_followed(
    record: Transaction, outcome: Outcome, told: list[tuple[object, ...]]
) -> None:
    """What did not commit changes nothing that is known of the rules; what may have committed makes it doubtful."""
    ruleset = Ruleset()
    assert rewrite(record, ruleset).outcome is outcome
    assert ruleset.told == told


@pytest.mark.parametrize(
    "record",
    [
        sent(data=batch(RULE, RULE)[:-30], size=len(batch(RULE, RULE))),
        sent(data=batch(RULE)[:20], size=5000, tail=batch(RULE)[-TAIL_BYTES:], flags=Flag.TAIL),
        sent(RULE, flags=Flag.SEVERAL),
        sent(RULE, flags=Flag.UNREAD),
    ],
    ids=["cut", "tail-only", "several", "unread"],
)
def test_what_is_not_known_whole_says_so(record: Transaction) -> None:
    """A cut copy, other messages or unread parts: anything may have changed besides, base chains too."""
    ruleset = Ruleset({(IPV4, "kube-proxy"): frozenset()})
    found = rewrite(record, ruleset)
    assert found.truncated
    assert BASE_CHAINS in found.details
    assert [call[2] for call in ruleset.told if call[0] == "committed"] == [False]


@pytest.mark.parametrize(
    ("change", "may"),
    [
        (RULE, False),
        (request(NEWCHAIN, "kube-proxy", name(3, "service-x")), False),
        (request(NEWCHAIN, "kube-proxy", name(3, "input"), HOOK), True),
        (request(DELCHAIN, "kube-proxy", name(3, "service-x")), False),
        (request(DELCHAIN, "kube-proxy", name(3, "filter-input")), True),
        (request(DELCHAIN, "unknown", name(3, "c")), True),
        (request(DELCHAIN, "kube-proxy", name(3, "filter-input"), family=IPV6), True),
        (request(DELTABLE, "kube-proxy"), True),
        (request(NEWTABLE, "kube-proxy"), True),
    ],
    ids=[
        "rule",
        "chain",
        "base",
        "delete",
        "delete-base",
        "unknown-table",
        "other-family",
        "deltable",
        "table",
    ],
)
def test_base_chains_that_may_have_changed_are_said(change: bytes, may: bool) -> None:
    """A deleted chain counts if it is a known base chain, or if nothing is known of its table."""
    ruleset = Ruleset({(IPV4, "kube-proxy"): frozenset({"filter-input"})})
    assert (BASE_CHAINS in rewrite(sent(change), ruleset).details) is may


@pytest.mark.parametrize(
    ("messages", "base", "labels"),
    [
        ([RULE], {}, (DataPlane.NFTABLES, "ipv4", "kube-proxy")),
        ([request(NEWRULE, "nat", name(2, "KUBE-SERVICES"))], {}, (DataPlane.IPTABLES_NFT, "ipv4", "nat")),
        (
            [request(NEWRULE, "filter", name(2, "input"))],
            {(IPV4, "filter"): frozenset({"input"})},
            (DataPlane.NFTABLES, "ipv4", "filter"),
        ),
        (
            [request(DELTABLE, "nat")],
            {(IPV4, "nat"): frozenset({"PREROUTING"})},
            (DataPlane.IPTABLES_NFT, "ipv4", "nat"),
        ),
        ([RULE, request(NEWRULE, "nat")], {}, (DataPlane.OTHER, "ipv4", SEVERAL)),
        (
            [RULE, request(NEWRULE, "kube-proxy", family=IPV6)],
            {},
            (DataPlane.NFTABLES, SEVERAL, "kube-proxy"),
        ),
        ([request(NEWRULE, "x", family=99)], {}, (DataPlane.NFTABLES, "other", "x")),
        ([], {}, (DataPlane.NFTABLES, NONE, NONE)),
    ],
    ids=["kube-proxy", "iptables", "look-alike", "gone", "mixed", "families", "unknown-family", "nothing"],
)
def test_labels_are_those_of_the_tables(
    messages: list[bytes], base: dict[tuple[int, str], frozenset[str]], labels: tuple[DataPlane, str, str]
) -> None:
    """The tables' names and base chains tell the data plane, as they were before the batch took them away."""
    found = rewrite(sent(*messages), Ruleset(base))
    assert (found.dataplane, found.family, found.table) == labels


@pytest.mark.parametrize(("kind", "family"), [(Kind.REPLACE4, IpFamily.IPV4), (Kind.REPLACE6, IpFamily.IPV6)])
def test_a_replaced_table_is_a_rewrite(kind: Kind, family: IpFamily) -> None:
    """All entries of a legacy table are replaced; it has no generation and no base chains to look for."""
    ruleset = Ruleset()
    found = rewrite(sent(data=replacement(), kind=kind, size=3092), ruleset)
    assert (found.dataplane, found.family, found.table) == (DataPlane.IPTABLES_LEGACY, family, "nat")
    assert found.objects == (ObjectCount(family, "nat", "entry", "replace", 8),)
    assert (found.outcome, found.size, found.generation) == (Outcome.COMMITTED, 3092, 0)
    assert (found.truncated, dict(found.details)) == (False, {})
    assert ruleset.told == [("replaced", family, "nat", 8)]


def test_a_failed_replacement_changes_nothing() -> None:
    """Its sizes are not taken over."""
    ruleset = Ruleset()
    found = rewrite(sent(data=replacement(), kind=Kind.REPLACE4, result=-11), ruleset)
    assert found.outcome is Outcome.FAILED
    assert ruleset.told == []


@pytest.mark.parametrize("size", [0, 43])
def test_a_replacement_that_cannot_be_read_is_none(size: int) -> None:
    """Without the header's table and entries there is nothing to say."""
    ruleset = Ruleset()
    record = sent(data=replacement()[:size], kind=Kind.REPLACE4)
    assert reducer(ruleset).rewrite(record) is None
    assert ruleset.told == []


@pytest.mark.parametrize(("exact", "generation"), [(True, 42), (False, 0)])
def test_one_bit_is_no_generation(exact: bool, generation: int) -> None:
    """Where the record has only a bit of the sequence, the generation is unknown."""
    found = reducer(exact=exact).rewrite(sent(RULE))
    assert found is not None
    assert found.generation == generation


def test_the_writer_is_the_parent_of_nft() -> None:
    """The run is the process whose syscall it was, the class that of the nearest known program."""
    found = rewrite(
        sent(RULE, parents=(6, 5)), None, began(7, "/usr/sbin/nft"), began(5, "/usr/local/bin/kube-proxy")
    )
    assert found.writer == "kube-proxy"
    assert found.run.executable == "/usr/sbin/nft"


def test_an_unknown_process_is_shown_by_what_the_record_has() -> None:
    """A process that nobody saw begin has a name and a cgroup, and its known parent is not taken for it."""
    found = rewrite(sent(RULE, parents=(6,)), None, began(6, "/usr/bin/kubelet"))
    assert found.run == ProcessRun(7, comm="writer", cgroup_id=77)
    assert found.writer == "kubelet"


def test_a_writer_from_another_namespace_is_other() -> None:
    """A thread that writes into the watched namespace through a socket of it, from a pod's, is not named."""
    found = rewrite(sent(RULE, task_netns=POD), None, began(7, "/usr/local/bin/kube-proxy"))
    assert found.writer == "other"
    assert found.netns == WATCHED


def test_touched_chains_tell_the_part_of_an_all_in_one_program() -> None:
    """k3s writes flannel's chains and kube-proxy's from one process."""
    k3s = began(7, "/usr/local/bin/k3s")
    assert rewrite(sent(request(NEWRULE, "filter", name(2, "FLANNEL-FWD"))), None, k3s).writer == "flannel"
    assert rewrite(sent(request(NEWRULE, "nat", name(2, "KUBE-SERVICES"))), None, k3s).writer == "kube-proxy"


def test_a_process_can_be_classified_without_a_record() -> None:
    """The class of a transaction that is still under way, by the process and its parents, else by its cgroup."""
    made = reducer(None, began(7, "/usr/sbin/nft", parent=6), began(6, "/usr/bin/dockerd"))
    assert made.writer(7) == "docker"
    assert made.writer(99) == "other"
    unit = reducer(None, began(7, "/usr/bin/python3"), cgroup="/system.slice/firewalld.service")
    assert unit.writer(7) == "firewalld"


@settings(deadline=None)  # a busy machine is no failure
@given(
    st.sampled_from([Kind.FLAT, Kind.VECTOR, Kind.REPLACE4, Kind.REPLACE6]),
    st.binary(max_size=200) | st.binary(max_size=100).map(batch),
    st.sets(st.sampled_from(Flag)),
    st.integers(0, 10_000),
    st.booleans(),
)
def test_any_bytes_reduce(kind: Kind, data: bytes, flags: set[Flag], more: int, moved: bool) -> None:
    """Nothing is raised, a batch always becomes a rewrite, and what a cut copy hides is never called whole."""
    record = sent(data=data, kind=kind, flags=sum(flags, NO_FLAGS), size=len(data) + more, moved=moved)
    ruleset = Ruleset()
    found = reducer(ruleset).rewrite(record)
    assert (found is None) == (not record.is_batch and len(data) < 44)
    if found is not None and record.is_batch:
        assert found.truncated or not more
        assert [call[0] for call in ruleset.told] == {
            Outcome.COMMITTED: ["committed"],
            Outcome.UNKNOWN: ["doubt"],
        }.get(found.outcome, [])
