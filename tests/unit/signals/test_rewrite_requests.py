# SPDX-License-Identifier: Apache-2.0
"""What writers ask netlink for by themselves: the kernel's layout, who is followed, and what is told of them."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kptrace.model.errors import KernelError
from kptrace.model.rewrite import ProcessRun
from kptrace.signals import rewrite_requests_records as records
from kptrace.signals.processes import ProcessTable
from kptrace.signals.rewrite_requests import WritersRequests, writer_itself
from kptrace.signals.rewrite_requests_records import Asker, Requests, Subsystem, decode, is_requests
from kptrace.signals.writers import Writers, parse_writer
from tests.unit.c_layout import numbers, run

HEADER = "kptrace/rewrite.h"
HERE, ELSEWHERE = 10, 11
PROXY, STRANGER = 100, 200


def test_records_are_read_as_c_writes_them(tmp_path: Path) -> None:
    """A record of the ring has its members in order, and says whose and what."""
    made = run(
        tmp_path,
        HEADER,
        "struct request_record it = { .kind = KIND_REQUESTS, .key = { .tgid = 1, .netns = 2, .what = 10 << 8 | 10 },"
        " .span = { .begin_ns = 3, .last_ns = 4, .requests = 5 } }; dump(it);",
    )
    assert decode(made) == Requests(Asker(1, 2, Subsystem.NFTABLES, "ipv6"), 3, 4)
    assert is_requests(made)


def test_sizes_are_the_compilers(tmp_path: Path) -> None:
    """No padding but what is named."""
    expected = {
        "sizeof(struct request_key)": records.KEY.size,
        "sizeof(struct request_span)": records.SPAN.size,
        "sizeof(struct request_record)": records.RECORD.size,
        "KIND_REQUESTS": records.KIND,
    }
    assert numbers(tmp_path, HEADER, *expected) == expected


@pytest.mark.parametrize(
    ("what", "family"), [(2, "ipv4"), (10, "ipv6"), (1, "inet"), (0, ""), (3, ""), (7, ""), (99, "")]
)
def test_families_are_those_of_a_run(what: int, family: str) -> None:
    """All families at once, and those that no Service is of, are none."""
    for subsystem in Subsystem:
        key = records.KEY.pack(1, 2, subsystem << 8 | what, 0)
        assert records.decode_key(key) == Asker(1, 2, subsystem, family)
    assert records.decode_key(records.KEY.pack(1, 2, 5 << 8 | what, 0)) is None


@given(st.binary(max_size=100))
def test_any_bytes_decode(data: bytes) -> None:
    """Nothing is raised."""
    assert decode(data) is None or len(data) >= records.RECORD.size


def asker(tgid: int = PROXY, family: str = "ipv4", netns: int = HERE) -> Asker:
    """Who dumps rules."""
    return Asker(tgid, netns, Subsystem.NFTABLES, family)


@dataclass
class Kernel:
    """The maps as plain lists.

    Attributes:
        askers: first requests that wait.
        kept: spans of those who are followed.
        room: how many may be followed.
        refuses: what comes of attaching.
        attached: how often it was tried.
    """

    askers: list[Requests] = field(default_factory=list)
    kept: list[Requests] = field(default_factory=list)
    followed: list[int] = field(default_factory=list)
    room: int = 64
    refuses: KernelError | None = None
    attached: int = 0

    def take_askers(self) -> Iterable[Requests]:
        """Each once."""
        taken, self.askers = self.askers, []
        return taken

    def spans(self) -> Iterable[Requests]:
        """As they are."""
        return list(self.kept)

    def follow(self, tgid: int) -> bool:
        """While there is room."""
        if len(self.followed) >= self.room:
            return False
        self.followed.append(tgid)
        return True

    def unfollow(self, tgid: int) -> None:
        """Room for another."""
        self.followed.remove(tgid)

    def attach_receives(self) -> None:
        """Refused or not."""
        self.attached += 1
        if self.refuses:
            raise self.refuses


@dataclass
class Bench:
    """Requests of a node where processes from 100 to 199 are writers."""

    kernel: Kernel = field(default_factory=Kernel)
    told: list[Requests] = field(default_factory=list)
    dead: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Nobody is followed."""
        self.requests = WritersRequests(
            self.kernel,
            HERE,
            lambda tgid: 100 <= tgid < 200,
            lambda tgid: tgid not in self.dead,
            self.told.append,
        )

    def ask(self, *first: Requests) -> None:
        """Processes ask for the first time."""
        self.kernel.askers += first
        self.requests.consume(lambda: None)

    def tick(self, *kept: Requests, ring: Iterable[Requests] = ()) -> list[Requests]:
        """What is told of when these are the spans, and these wait in the ring."""
        self.told.clear()
        self.kernel.kept = list(kept)

        def read() -> None:
            for each in ring:
                what = each.asker.subsystem << 8 | 2
                key = records.KEY.pack(each.asker.tgid, each.asker.netns, what, 0)
                span = records.SPAN.pack(each.begin_ns, each.end_ns, 1)
                self.requests.record(records.RECORD.pack(records.KIND, 0, key, span))

        self.requests.consume(read)
        return list(self.told)


def span(begin: int, end: int, whose: Asker | None = None) -> Requests:
    """Requests."""
    return Requests(whose or asker(), begin, end)


def test_only_writers_in_the_watched_namespace_are_followed() -> None:
    """The receives are attached with the first of them, once; of nobody else anything is told."""
    bench = Bench()
    bench.ask(span(1, 1, asker(STRANGER)), span(2, 2, asker(PROXY, netns=ELSEWHERE)))
    assert (bench.told, bench.kernel.followed, bench.kernel.attached) == ([], [], 0)
    assert bench.requests.status()["receives"] == "not attached: no writer that asks by itself was seen"
    first = [span(3, 3), span(4, 4, asker(family="ipv6")), span(5, 5, asker(PROXY + 1))]
    bench.ask(*first)
    assert bench.told == first
    assert bench.kernel.followed == [PROXY, PROXY + 1]
    assert bench.kernel.attached == 1
    assert bench.requests.status() == {"receives": "attached", "followed": [PROXY, PROXY + 1]}


def test_looking_connections_up_is_no_reason_to_see_answers() -> None:
    """Every kube-proxy does that; a later list of rules is one."""
    bench = Bench()
    bench.ask(span(1, 1, Asker(PROXY, asker().netns, Subsystem.CTNETLINK, "ipv4")))
    assert (bench.kernel.followed, bench.kernel.attached) == ([PROXY], 0)
    bench.tick(span(10, 20))
    assert bench.kernel.attached == 1


def test_what_lasts_is_told_piece_by_piece() -> None:
    """Each moment of it once, in the order of time, also of a span that the ring brings when it is over."""
    bench = Bench()
    bench.ask(span(1, 1))
    assert bench.tick(span(10, 20)) == [span(10, 20)]
    assert bench.tick(span(10, 20)) == []
    assert bench.tick(span(10, 50)) == [span(20, 50)]
    assert bench.tick(span(10, 55), ring=[span(10, 60)]) == [span(50, 60)]
    assert bench.tick(span(200, 210), ring=[span(100, 130)]) == [span(100, 130), span(200, 210)]
    assert bench.tick(span(200, 220, asker(netns=ELSEWHERE))) == []


def test_what_cannot_be_attached_is_said_and_not_tried_again() -> None:
    """The requests themselves are still told of."""
    bench = Bench(Kernel(refuses=KernelError("no", errno=1)))
    bench.ask(span(1, 1))
    bench.ask(span(2, 2, asker(PROXY + 1)))
    assert bench.kernel.attached == 1
    assert bench.requests.status()["receives"] == "refused: no"
    assert bench.tick(span(10, 20)) == [span(10, 20)]


def test_writers_beyond_the_bound_are_counted() -> None:
    """And one that ended makes room."""
    bench = Bench(Kernel(room=1))
    bench.ask(span(1, 1), span(2, 2, asker(PROXY + 1)))
    assert bench.requests.losses() == {"writer_not_followed": 1, "requests_undecodable": 0}
    bench.dead.add(PROXY)
    assert bench.tick() == []
    assert bench.requests.status()["followed"] == []
    bench.ask(span(3, 3, asker(PROXY + 1)))
    assert bench.kernel.followed == [PROXY + 1]


def test_records_that_cannot_be_read_are_counted() -> None:
    """A cut one."""
    bench = Bench()
    bench.requests.record(records.RECORD.pack(records.KIND, 0, b"", b"")[:-1])
    assert bench.requests.losses()["requests_undecodable"] == 1


def test_a_writer_is_one_by_itself() -> None:
    """By executable or cgroup; its tools, its children and kptrace are none, and who is gone is not either."""
    proxy = ProcessRun(1, 0, executable="/usr/local/bin/kube-proxy")
    runs = {
        1: proxy,
        2: ProcessRun(2, 1, executable="/usr/sbin/nft", comm="nft"),
        3: ProcessRun(3, 1, executable="/bin/dash", comm="sh"),
        4: ProcessRun(4, 0, executable="/opt/agent"),
        5: replace(proxy, tgid=5),
    }
    edge = "/system.slice/edge.service"
    cgroups = {2: edge, 4: edge}
    table = ProcessTable(runs.get)
    judge = writer_itself(
        lambda: table,
        Writers([parse_writer("edge=cgroup:*/edge.service")]),
        lambda run: cgroups.get(run.tgid, ""),
        own=5,
    )
    assert [judge(tgid) for tgid in (1, 2, 3, 4, 5, 6)] == [True, False, False, True, False, False]
