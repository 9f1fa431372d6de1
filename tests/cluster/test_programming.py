# SPDX-License-Identifier: Apache-2.0
"""Programming latency against the real kube-proxy: every change once, each with the commit that carried it.

The oracles are not kptrace: strace has the system calls, the tools' own input has what each of them wrote. The long forms
are `make acceptance PART=programming`.
"""

import time
from collections.abc import Callable, Sequence

import pytest

from kptrace.experiments import manifests
from kptrace.experiments.services import make_services
from kptrace.model.identity import Endpoint
from tests.cluster.committing import Committing, committing
from tests.cluster.controlplane import ControlPlane
from tests.cluster.kptrace import Account, Changed
from tests.cluster.kubeproxy import Mode
from tests.cluster.objects import service
from tests.cluster.setting import Setting, ends

MOST = 44
#: Times in /status are in microseconds.
_ROUNDED_NS = 1000
each_mode = pytest.mark.parametrize("mode", Mode)


def in_one_write(setting: Setting, more: Sequence[Endpoint]) -> list[int]:
    """All at once."""
    begin = setting.scale([*setting.web.endpoints, *more])
    return [begin] * len(more)


def back_to_back(setting: Setting, more: Sequence[Endpoint]) -> list[int]:
    """One write an endpoint, as fast as the API server answers."""
    return [setting.scale([*setting.web.endpoints, each]) for each in more]


def every_100_ms(setting: Setting, more: Sequence[Endpoint]) -> list[int]:
    """One write an endpoint, each 100 ms after the beginning of the one before."""
    begun = []
    due = time.monotonic()
    for each in more:
        time.sleep(max(0.0, due - time.monotonic()))
        due += 0.1
        begun.append(setting.scale([*setting.web.endpoints, each]))
    return begun


def check_commits(setting: Setting, changes: Sequence[Changed]) -> list[Changed]:
    """Each change's commit is a system call that strace saw; returns those whose call did not write the change first.

    An endpoint that comes is in the input of the process that made the call, and in none before; one that goes is in the
    input of all before, and not in this one.
    """
    calls = committing(setting.trace)
    order = {call.tgid: place for place, call in enumerate(calls)}
    wrong = []
    for change in changes:
        call = _call_of(change, calls)
        # Of all writes of this Service, in the order of their commits: whether the endpoint is in it.
        of_web = sorted(
            (pid for pid in setting.tools.writes_of_service(setting.web) if pid in order),
            key=order.__getitem__,
        )
        has = set(setting.tools.writes_of(change.address))
        added = change.kind == "endpoint_added"
        after = [pid for pid in of_web if order[pid] <= order[call.tgid]]
        right = after and after[-1] == call.tgid and (call.tgid in has) is added
        if not right or (len(after) > 1 and (after[-2] in has) is added):
            wrong.append(change)
    return wrong


def _call_of(change: Changed, calls: Sequence[Committing]) -> Committing:
    found = [
        call
        for call in calls
        if call.begin_ns - _ROUNDED_NS <= change.committed_ns <= call.end_ns + _ROUNDED_NS
    ]
    assert len(found) == 1, (change, found)
    return found[0]


def check_receipts(changes: Sequence[Changed], begun: dict[str, int]) -> None:
    """Each event arrived after the write of its endpoint had begun, and they arrived in the order of the writes."""
    for change in changes:
        assert change.received_ns + _ROUNDED_NS >= begun[change.address], change
    order = sorted(changes, key=lambda change: begun[change.address])
    assert [each.received_ns for each in order] == sorted(each.received_ns for each in order)


def since_triggers(setting: Setting) -> int:
    """Samples so far that are counted from the annotation's time."""
    return setting.kptrace.scrape().distribution("kptrace_programming_since_trigger_seconds").count


def _addresses(endpoints: Sequence[Endpoint]) -> list[str]:
    return [f"{end.ip}:{end.port}" for end in endpoints]


@each_mode
@pytest.mark.timeout(900)
def test_scale_from_1_to_44(mode: Mode, start_setting: Callable[..., Setting]) -> None:
    """43 endpoints more are 43 changes, however they are written, each timed to the commit that had it first."""
    setting = start_setting(mode, traced=True)
    alone = list(setting.web.endpoints)
    more = ends(MOST - 1)
    for write in (in_one_write, back_to_back, every_100_ms):
        before, triggers = setting.kptrace.account(), since_triggers(setting)
        begun = dict(zip(_addresses(more), write(setting, more), strict=True))
        account = setting.kptrace.settle(len(more), before)
        changes = setting.changes(len(more))
        _print(mode, write.__name__, account, changes)
        assert account == Account(len(more), 0, {**account.fates, "superseded": 0, "unmeasured": 0})
        assert {change.address for change in changes} == begun.keys()
        assert since_triggers(setting) - triggers == len(more)
        check_receipts(changes, begun)
        wrong = check_commits(setting, changes)
        assert not [change for change in wrong if change.attribution == "exact"]
        if mode is Mode.NFTABLES:
            assert {change.attribution for change in changes} == {"exact"}
        print(f"{mode} {write.__name__}: {len(wrong)} inferred wrongly: {wrong}")

        before = setting.kptrace.account()
        setting.scale(alone)
        assert setting.kptrace.settle(len(more), before).timed == len(more)


def _print(mode: Mode, what: str, account: Account, changes: Sequence[Changed]) -> None:
    took = sorted(change.milliseconds for change in changes if change.fate == "programmed")
    middle = f"min/med/max {took[0]:.0f}/{took[len(took) // 2]:.0f}/{took[-1]:.0f} ms" if took else ""
    exact = sum(change.attribution == "exact" for change in changes)
    print(f"{mode} {what}: {dict(account.fates)} {exact} exact, {middle}")


@each_mode
@pytest.mark.timeout(900)
def test_rolling_restart_of_44(mode: Mode, start_setting: Callable[..., Setting]) -> None:
    """Each of 44 endpoints is replaced, one after the other: 44 that came and 44 that went, all with their commits."""
    setting = start_setting(mode, traced=True)
    old, new = ends(MOST, 100), ends(MOST, 200)
    before = setting.kptrace.account()
    setting.scale(old)
    setting.kptrace.settle(MOST + 1, before)

    before, begun = setting.kptrace.account(), {}
    for place in range(MOST):
        address = _addresses([old[place], new[place]])
        begun |= dict.fromkeys(address, setting.scale([*new[: place + 1], *old[place + 1 :]]))
    account = setting.kptrace.settle(2 * MOST, before)
    changes = setting.changes(2 * MOST)
    _print(mode, "rolling restart", account, changes)
    assert account == Account(2 * MOST, 0, {**account.fates, "superseded": 0, "unmeasured": 0})
    kinds = [change.kind for change in changes]
    assert {kind: kinds.count(kind) for kind in kinds} == {"endpoint_added": MOST, "endpoint_removed": MOST}
    check_receipts(changes, begun)
    wrong = check_commits(setting, changes)
    assert not [change for change in wrong if change.attribution == "exact"]
    if mode is Mode.NFTABLES:
        assert {change.attribution for change in changes} == {"exact"}
    print(f"{mode} rolling restart: {len(wrong)} inferred wrongly")


@each_mode
@pytest.mark.timeout(900)
def test_services_come_and_go(
    mode: Mode, plane: ControlPlane, kube_namespace: str, start_setting: Callable[..., Setting]
) -> None:
    """Services with endpoints, and one without, are changes that each have a commit; so are their ends."""
    setting = start_setting(mode)
    specs = make_services(5, 3, namespace=kube_namespace, first=2000)
    objects = [*manifests.objects(specs), service("idle", kube_namespace, "10.96.9.5")]
    ports = len(specs) + 1
    before = setting.kptrace.account()
    for written in (plane.client.create_all, lambda every: plane.client.many(plane.client.delete, every)):
        written(objects)
        setting.kptrace.settle(ports, before)
        account = setting.kptrace.quiet().since(before)
        kinds = [change.kind for change in setting.kptrace.changes()[-account.changes :]]
        print(f"{mode} Services: {account} { {kind: kinds.count(kind) for kind in sorted(set(kinds))} }")
        assert account.fates["unmeasured"] == account.pending == 0
        # Each Service port once, and what came before it or went after it by itself.
        whole = [kind for kind in kinds if kind.startswith("service")]
        assert len(whole) == ports
        assert len(kinds) <= ports + 3 * len(specs)
        before = setting.kptrace.account()
