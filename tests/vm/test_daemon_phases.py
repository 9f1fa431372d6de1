# SPDX-License-Identifier: Apache-2.0
"""The installed daemon's phases of rewrites on each kernel, in /metrics, against the same daemon's system calls."""

import json
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NoReturn

import pytest

from kptrace.experiments.daemon_process import DaemonProcess
from kptrace.experiments.netns import Namespace
from kptrace.experiments.scrape import Scrape, fetch
from tests.vm.adding_up import fills
from tests.vm.daemons import running
from tests.vm.test_rewrite_phases import EMPTY, RULES, TABLE, big_table, needs_legacy, rules

PHASE, REWRITE = "kptrace_rewrite_phase_duration_seconds", "kptrace_rewrite_duration_seconds"
# The phases come after everything else, compiled and attached while another machine uses the other core.
_SECONDS = 400.0

pytestmark = [pytest.mark.promised("rewrite_phases", "kprobe"), pytest.mark.promised("rewrite", "tracepoint")]


@pytest.fixture(scope="module")
def node() -> Iterator[Namespace]:
    """One namespace for all tests of this file: to start the daemon takes a minute."""
    subprocess.run(["modprobe", "-a", "nf_tables", "nft_compat", "ip_tables"], check=True)
    with Namespace("phases") as made:
        yield made


@pytest.fixture(scope="module")
def daemon(node: Namespace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """The image's daemon, once its phases are measured."""
    with running(node, tmp_path_factory.mktemp("daemon")) as process:
        ends = time.monotonic() + _SECONDS
        while not in_use(process):
            assert time.monotonic() < ends, status(process)
            time.sleep(0.5)
        print(status(process))
        yield process


def status(process: DaemonProcess) -> dict[str, dict[str, str]]:
    """What /status says of each mechanism of the phases."""
    document = json.loads(fetch(process.port, "/status?format=json")[1])
    return {row["mechanism"]: row for row in document["signals"] if row["signal"] == "rewrite_phases"}


def in_use(process: DaemonProcess) -> list[str]:
    """The mechanisms that measure."""
    rows = status(process).items()
    return [mechanism for mechanism, row in rows if row["state"] in {"active", "degraded"}]


def seconds(scrape: Scrape, before: Scrape, name: str, **labels: str) -> float:
    """What a histogram's sum gained."""
    return scrape.total(f"{name}_sum", **labels) - before.total(f"{name}_sum", **labels)


def count(scrape: Scrape, before: Scrape, name: str, **labels: str) -> int:
    """What a histogram's count gained."""
    return scrape.distribution(name, **labels).count - before.distribution(name, **labels).count


def write(
    daemon: DaemonProcess, node: Namespace, argv: list[str], text: str, phase: str
) -> tuple[Scrape, Scrape]:
    """The scrapes before and after one transaction, whose last phase is there in the second."""
    before = daemon.scrape()
    # A transaction that is to fail has its exit code shown by its outcome.
    node.call(lambda: subprocess.run(argv, input=text, text=True, capture_output=True, check=False))
    after = daemon.scrape_until(
        lambda now: count(now, before, PHASE, phase=phase) > 0 and count(now, before, REWRITE) > 0,
        seconds=_SECONDS,
    )
    return before, after


def parts(after: Scrape, before: Scrape, plane: str, *phases: str) -> tuple[float, Mapping[str, float]]:
    """Seconds of the system call and of its phases, of which each happened once and no other one did."""
    within = ("parse", "commit", "abort", "replace", "counters")
    counts = {phase: count(after, before, PHASE, dataplane=plane, phase=phase) for phase in within}
    assert counts == {phase: int(phase in phases) for phase in within}
    whole = seconds(after, before, REWRITE, dataplane=plane)
    return whole, {phase: seconds(after, before, PHASE, dataplane=plane, phase=phase) for phase in phases}


@pytest.mark.timeout(900)
def test_exactly_one_mechanism_measures(daemon: DaemonProcess) -> None:
    """It is fentry where that works, kprobes elsewhere, and the other's row says why it is not."""
    rows = status(daemon)
    (used,) = in_use(daemon)
    (other,) = rows.keys() - {used}
    assert "attached: " in rows[used]["detail"]
    assert "nf_tables_commit" in rows[used]["detail"]
    assert rows[other]["state"] in {"off", "unavailable"}
    assert rows[other]["reason"] and rows[other]["detail"]
    is_module = Path("/sys/module/nf_tables/initstate").exists()
    pinned = rows[used]["detail"].partition("; pins ")[2].partition(";")[0].split(", ")
    assert ("nf_tables" in pinned) is (used == "fentry" and is_module)


@pytest.mark.timeout(900)
def test_parse_and_commit_add_up_to_the_system_call(daemon: DaemonProcess, node: Namespace) -> None:
    """Of a batch with 10,000 rules parse and commit are the call's duration within a tenth."""

    def once() -> tuple[float, Mapping[str, float]]:
        # One rule first: a batch that needs a module which is not loaded yet is aborted, and tried again by the kernel.
        write(daemon, node, ["nft", "-f", "-"], EMPTY + rules(1), "commit")
        before, after = write(daemon, node, ["nft", "-f", "-"], rules(), "commit")
        assert count(after, before, REWRITE, outcome="committed") == 1
        return parts(after, before, "nftables", "parse", "commit")

    fills(once)


@pytest.mark.timeout(900)
def test_an_aborted_batch_shows_as_aborted(daemon: DaemonProcess, node: Namespace) -> None:
    """A batch of 10,000 rules whose last is wrong has parse and abort, no commit, and they add up as well."""
    write(daemon, node, ["nft", "-f", "-"], TABLE + rules(1), "commit")
    wrong = rules() + "add rule ip t nowhere accept\n"

    def once() -> tuple[float, Mapping[str, float]]:
        before, after = write(daemon, node, ["nft", "-f", "-"], wrong, "abort")
        assert count(after, before, REWRITE, outcome="failed") == 1
        return parts(after, before, "nftables", "parse", "abort")

    fills(once)


@pytest.mark.timeout(900)
def test_a_replaced_table_adds_up(
    daemon: DaemonProcess, node: Namespace, lacking: Callable[[str], NoReturn]
) -> None:
    """Of a legacy table with 10,000 rules parse, replace and counters are the call's duration within a tenth."""
    needs_legacy(lacking)
    text = big_table(RULES)

    def once() -> tuple[float, Mapping[str, float]]:
        before, after = write(daemon, node, ["iptables-legacy-restore"], text, "counters")
        return parts(after, before, "iptables-legacy", "parse", "replace", "counters")

    fills(once)


def test_losses_are_exported(daemon: DaemonProcess) -> None:
    """Every reason of a loss has a counter, and none of this was lost."""
    scrape = daemon.scrape()
    for reason in ("ring_full", "running_full", "recursion_miss", "kprobe_miss", "unpaired", "undecodable"):
        assert scrape.lines("kptrace_events_lost_total", signal="rewrite_phases", reason=reason)
    assert scrape.total("kptrace_events_lost_total", signal="rewrite_phases") == 0
