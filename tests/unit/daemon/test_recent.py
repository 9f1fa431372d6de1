# SPDX-License-Identifier: Apache-2.0
"""The flight recorder: what is kept, with what, and for how long."""

from collections.abc import Sequence
from dataclasses import replace

from kptrace.daemon.local import documents
from kptrace.daemon.recent import (
    ANY,
    LIMIT,
    MAX_NAMED,
    MAX_SERVICES,
    NAMED_WITHIN_NS,
    FlightRecorder,
    Written,
)
from kptrace.dataplanes.told import EVERYTHING, Touched
from kptrace.model.identity import Protocol, ServicePort
from kptrace.model.metrics import OTHER
from kptrace.model.netfilter import DataPlane
from kptrace.model.rewrite import ObjectCount, Outcome, ProcessRun, Rewrite
from kptrace.signals.sync_events import Phase, Sync

MS = 1_000_000
BOOT = 1_700_000_000_000_000_000
COMMIT = Rewrite(
    DataPlane.NFTABLES, "ipv4", "kube-proxy", "kube-proxy", ProcessRun(7), 40 * MS, 60 * MS, 1234,
    Outcome.COMMITTED, objects=(ObjectCount("ip", "kube-proxy", "rule", "add", 5),), generation=9,
)  # fmt: skip


def sync(ms: int, outcome: Outcome = Outcome.COMMITTED, *commits: Rewrite) -> Sync:
    """A run that began at 0."""
    phases = {Phase.LIST: ms * MS}
    return Sync("nftables", "ipv4", "kube-proxy", 1, 0, ms * MS, outcome, phases, commits)


def ports(number: int) -> frozenset[ServicePort]:
    """So many Service ports."""
    return frozenset(ServicePort("ns", f"s{n:03}", "http", Protocol.TCP) for n in range(number))


def recorder(touches: Touched = frozenset()) -> FlightRecorder:
    """One for which every transaction touches the same."""
    return FlightRecorder(lambda at: BOOT + at, lambda _written: touches)


def test_usual_runs_are_not_kept_and_slow_ones_are_with_what_is_usual() -> None:
    """A run three times as long as the median of those before has a number, phases and transactions."""
    made = recorder(ports(2))
    assert not any(made.sync(sync(100)) for _ in range(10))
    made.written(COMMIT, b"batch")
    number = made.sync(sync(400, Outcome.COMMITTED, COMMIT))
    row = made.row(number)
    assert row is not None
    assert (row["why"], row["ms"], row["usual ms"], row["phases"]) == ("slow", 400.0, 100.0, {"list": 400.0})
    assert row["at"] == (BOOT + 400 * MS) / 1e9
    assert row["transactions"] == [
        {
            "table": "kube-proxy", "outcome": "committed", "began ms after": 40.0, "ms": 20.0, "bytes": 1234,
            "objects": {"rule add": 5}, "generation": 9,
        }
    ]  # fmt: skip
    assert row["services"] == ["ns/s000:http/tcp", "ns/s001:http/tcp"]


def test_failed_runs_are_always_kept() -> None:
    """Even the first, and they do not change what is usual."""
    made = recorder()
    assert [made.sync(sync(5, Outcome.FAILED)) for _ in range(9)] == [str(n) for n in range(1, 10)]
    assert made.rows(names=False)[0]["why"] == "failed"
    assert made.rows(names=False)[0]["usual ms"] is None


def test_names_of_services_need_permission() -> None:
    """A row without names has no Services, whatever it touched."""
    made = recorder(ports(1))
    made.written(COMMIT, b"")
    made.sync(sync(5, Outcome.FAILED, COMMIT))
    assert "services" not in made.rows(names=False)[0]
    assert made.rows(names=True)[0]["services"] == ["ns/s000:http/tcp"]


def test_what_a_run_touched_is_bounded_or_unknown() -> None:
    """More Services than fit are `~other`; bytes that rule nothing out are `~any`; others' transactions are not its own."""
    many = recorder(ports(MAX_SERVICES + 3))
    many.written(COMMIT, b"")
    many.sync(sync(5, Outcome.FAILED, COMMIT))
    found = many.rows(names=True)[0]["services"]
    assert isinstance(found, list)
    assert len(found) == MAX_SERVICES + 1
    assert found[-1] == OTHER
    silent = recorder(EVERYTHING)
    silent.written(COMMIT, b"")
    silent.sync(sync(5, Outcome.FAILED, COMMIT))
    silent.sync(sync(5, Outcome.FAILED, replace(COMMIT)))
    assert [row["services"] for row in silent.rows(names=True)] == [[], [ANY]]


def test_the_oldest_go_first() -> None:
    """No more than the limit is kept, and a number is never given twice."""
    made = recorder()
    numbers = [made.sync(sync(5, Outcome.FAILED)) for _ in range(LIMIT + 7)]
    assert len(set(numbers)) == LIMIT + 7
    assert len(made.rows(names=True)) == LIMIT
    assert made.row(numbers[6]) is None
    assert made.row(numbers[7]) is not None


def test_a_writer_that_fails_in_a_loop_pushes_only_its_own_records_out() -> None:
    """The oldest record goes of the writer that has most of them."""
    made = recorder()
    number = made.sync(replace(sync(5, Outcome.FAILED), writer="other"))
    last = [made.sync(sync(5, Outcome.FAILED)) for _ in range(3 * LIMIT)][-1]
    assert made.row(number) is not None
    assert made.row(last) is not None
    assert len(made.rows(names=False)) == LIMIT


def test_names_are_asked_for_a_few_records_at_a_time() -> None:
    """Beyond those a record says that any Service may have been touched, until some time has passed."""
    asked: list[Sequence[Written]] = []

    def touches(written: Sequence[Written]) -> Touched:
        asked.append(written)
        return ports(1)

    made = FlightRecorder(lambda at: BOOT + at, touches)
    made.written(COMMIT, b"one")
    made.written(COMMIT, b"two")
    failed = sync(5, Outcome.FAILED, COMMIT)
    for _ in range(MAX_NAMED + 2):
        made.sync(failed)
    made.sync(replace(failed, end_ns=failed.end_ns + NAMED_WITHIN_NS))
    found = [row["services"] for row in reversed(made.rows(names=True))]
    named = ["ns/s000:http/tcp"]
    assert found == [*[named] * MAX_NAMED, [ANY], [ANY], named]
    assert asked == [[(COMMIT, b"one"), (COMMIT, b"two")]] * (MAX_NAMED + 1)


def test_a_record_is_a_document_of_its_own() -> None:
    """The local socket has it at /records/NUMBER, a Service at /services/NAMESPACE/NAME, and nothing elsewhere."""
    made = recorder()
    number = made.sync(sync(5, Outcome.FAILED))

    def find(path: str) -> object | None:
        return documents(made.row, lambda namespace, name: {"service": f"{namespace}/{name}"}, path)

    assert find(f"/records/{number}") == made.row(number)
    assert find("/services/ns/web") == {"service": "ns/web"}
    for path in ("/records/999", f"/{number}", "/records", "/services/ns", "/services/ns/web/more"):
        assert find(path) is None
