# SPDX-License-Identifier: Apache-2.0
"""Programming latency where something fails: what is late is told as late, and nothing is told that was not."""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.cluster.controlplane import ControlPlane
from tests.cluster.kptrace import Account, kptrace_kubeconfig
from tests.cluster.kubeproxy import Mode
from tests.cluster.line import Line
from tests.cluster.programs import wait_for
from tests.cluster.setting import Extent, Setting, ends

_NETWORK_PROGRAMMING = "kubeproxy_network_programming_duration_seconds"
_RUNNING = "kptrace_sync_running_seconds"


def one(**fates: int) -> Account:
    """One change with this fate."""
    none = {"programmed": 0, "early": 0, "superseded": 0, "unmeasured": 0}
    return Account(1, 0, {**none, **fates})


def add_one(setting: Setting) -> Account:
    """Write one endpoint more and wait for its commit; what became of it: a commit that beat the event is one as well."""
    before = setting.kptrace.account()
    setting.scale([*setting.web.endpoints, *ends(1, len(setting.web.endpoints))])
    account = setting.kptrace.settle(1, before, seconds=60.0)
    return replace(account, fates={**account.fates, "programmed": account.timed, "early": 0})


def network_programming(setting: Setting) -> int:
    """Samples of kube-proxy's own metric of the same."""
    return setting.proxy.scrape().distribution(_NETWORK_PROGRAMMING).count


@pytest.mark.timeout(900)
def test_a_failing_tool(start_setting: Callable[..., Setting], extent: Extent) -> None:
    """While nft fails a change is pending and ages; then it is one long sample, of which kube-proxy's metric has none."""
    setting = start_setting(Mode.NFTABLES, sync_period=extent.retry)
    samples = network_programming(setting)
    assert add_one(setting) == one(programmed=1)
    wait_for(lambda: network_programming(setting) == samples + 1, "kube-proxy's own sample")

    before = setting.kptrace.account()
    setting.tools.fail()
    begin = setting.scale([*setting.web.endpoints, *ends(1, 50)])
    ages = []
    while time.time_ns() - begin < extent.failing_seconds * 1e9:
        ages.append(setting.kptrace.scrape().total("kptrace_programming_oldest_pending_seconds"))
        time.sleep(extent.failing_seconds / 10)
    assert setting.kptrace.account().since(before).pending == 1
    assert ages[-1] > extent.failing_seconds / 2
    assert ages == sorted(ages)
    setting.tools.mend()
    assert setting.kptrace.settle(1, before, seconds=90.0) == one(programmed=1)

    (change,) = setting.changes(1)
    print(f"failed for {extent.failing_seconds:.0f} s: a sample of {change.milliseconds / 1000:.1f} s")
    assert change.milliseconds > extent.failing_seconds * 1000
    failed = {"outcome": "failed", "writer": "kube-proxy"}
    wait_for(
        lambda: setting.kptrace.scrape().distribution("kptrace_sync_duration_seconds", **failed).count > 0,
        "a failed run",
    )
    assert network_programming(setting) == samples + 1


@pytest.mark.timeout(900)
def test_a_tool_that_stands_still(start_setting: Callable[..., Setting], extent: Extent) -> None:
    """A run whose nft is stopped is seen while it lasts, and its change is one sample of that length."""
    setting = start_setting(Mode.NFTABLES)
    before = setting.kptrace.account()
    setting.tools.hold()
    begin = time.monotonic()
    setting.scale([*setting.web.endpoints, *ends(1)])
    held = setting.tools.stop_held()
    try:
        wait_for(lambda: setting.kptrace.scrape().total(_RUNNING, writer="kube-proxy") > 5, "a long run")
        time.sleep(max(0.0, extent.held_seconds - (time.monotonic() - begin)))
        age = setting.kptrace.scrape().total(_RUNNING, writer="kube-proxy")
    finally:
        os.kill(held, signal.SIGCONT)
    assert setting.kptrace.settle(1, before) == one(programmed=1)
    (change,) = setting.changes(1)
    print(f"held: a run of {age:.1f} s, a sample of {change.milliseconds / 1000:.1f} s")
    assert change.milliseconds / 1000 > age > 5
    wait_for(lambda: setting.kptrace.scrape().total(_RUNNING, writer="kube-proxy") == 0, "the run's end")


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.timeout(900)
def test_kube_proxy_starts_again(mode: Mode, start_setting: Callable[..., Setting]) -> None:
    """A change while kube-proxy was away is one sample, with its new start; what it finds again is none."""
    setting = start_setting(mode)
    before = setting.kptrace.account()
    setting.proxy.crash()
    setting.scale([*setting.web.endpoints, *ends(1)])
    wait_for(lambda: setting.kptrace.account().since(before).pending == 1, "the pending change")
    away = time.time_ns()
    setting.proxy.restart()
    assert setting.kptrace.settle(1, before, seconds=60.0) == one(programmed=1)
    (change,) = setting.changes(1)
    assert change.committed_ns > away
    assert add_one(setting).timed == 1
    setting.kptrace.quiet()
    assert setting.kptrace.account().since(before).changes == 2


@pytest.mark.timeout(900)
def test_the_api_server_starts_again(start_setting: Callable[..., Setting], extent: Extent) -> None:
    """After an outage everything is listed anew, since what the server kept is gone: no change, and no name is lost."""
    setting = start_setting(Mode.NFTABLES)
    before, objects = setting.kptrace.account(), names(setting)
    with setting.plane.outage():
        time.sleep(extent.outage_seconds)
        assert names(setting) == objects
    wait_for(lambda: healed(setting), "kptrace's watches", seconds=150.0)
    expired = setting.kptrace.scrape().total("kptrace_identity_errors_total", reason="expired")
    print(f"after the outage: {expired:.0f} versions had expired")
    assert expired > 0
    assert names(setting) == objects
    assert setting.kptrace.account() == before
    # kube-proxy's watches are tried again with growing pauses, too: the first change may take long, but it is one.
    setting.scale([*setting.web.endpoints, *ends(1, 50)])
    assert setting.kptrace.settle(1, before, seconds=150.0).changes == 1
    setting.kptrace.quiet()
    assert add_one(setting) == one(programmed=1)


@pytest.mark.timeout(900)
def test_a_change_that_was_told_late(
    plane: ControlPlane, start_setting: Callable[..., Setting], tmp_path: Path
) -> None:
    """What happened while kptrace alone could not hear the API server is counted, and never timed."""
    with Line(tmp_path, plane.port) as line:
        setting = start_setting(Mode.NFTABLES, kubeconfig=line.kubeconfig(kptrace_kubeconfig(plane)))
        before = setting.kptrace.account()
        synced = setting.proxy.syncs()
        with line.cut():
            setting.scale([*setting.web.endpoints, *ends(1)])
            wait_for(lambda: setting.proxy.syncs() > synced, "kube-proxy's sync")
        account = setting.kptrace.settle(1, before, seconds=90.0)
        assert account == one(unmeasured=1)
        (change,) = setting.changes(1)
        assert change.reason == "relisted"
        wait_for(lambda: healed(setting), "kptrace's watches", seconds=90.0)
        setting.kptrace.quiet()
        assert add_one(setting) == one(programmed=1)


def names(setting: Setting) -> dict[str, float]:
    """How many objects kptrace knows."""
    scrape = setting.kptrace.scrape()
    return {
        kind: scrape.total("kptrace_identity_objects", kind=kind) for kind in ("services", "endpointslices")
    }


def healed(setting: Setting) -> bool:
    """Whether all of kptrace's watches are well."""
    return all(
        row["state"] == "active" for row in setting.kptrace.status()["signals"] if row["signal"] == "identity"
    )


@pytest.mark.timeout(300)
def test_what_never_had_to_be_programmed(start_setting: Callable[..., Setting]) -> None:
    """An endpoint that came and went during a run is superseded; an update of what no rule has is no change at all."""
    setting = start_setting(Mode.NFTABLES)
    before = setting.kptrace.account()
    setting.tools.hold()
    setting.scale([*setting.web.endpoints, *ends(1)])
    held = setting.tools.stop_held()
    try:
        stays = list(setting.web.endpoints)
        setting.scale([*stays, *ends(1, 50)])
        setting.scale(stays)
        # Nothing but the annotation is another one then.
        setting.scale(stays)
        wait_for(lambda: setting.kptrace.account().since(before).changes == 3, "all changes")
    finally:
        os.kill(held, signal.SIGCONT)
    account = setting.kptrace.settle(3, before)
    assert account == Account(3, 0, {"programmed": 1, "early": 0, "superseded": 2, "unmeasured": 0})
    assert add_one(setting) == one(programmed=1)
    assert setting.kptrace.quiet().since(before).changes == 4
