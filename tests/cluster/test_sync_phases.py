# SPDX-License-Identifier: Apache-2.0
"""Where the real kube-proxy's syncs spend their time, beside its own account of how long they took."""

import time
from collections.abc import Callable

import pytest

from kptrace.experiments import manifests
from kptrace.experiments.scrape import Scrape
from kptrace.experiments.services import change_endpoint, make_services
from tests.cluster.controlplane import ControlPlane
from tests.cluster.kptrace import Kptrace
from tests.cluster.kubeproxy import KubeProxy, Mode
from tests.cluster.programs import wait_for

DURATION, PHASE = "kptrace_sync_duration_seconds", "kptrace_sync_phase_duration_seconds"
OWN = "kubeproxy_sync_proxy_rules_duration_seconds"
WHO = {"family": "ipv4", "writer": "kube-proxy"}
PHASES = ("list", "compute", "write", "commit", "teardown", "lock_wait", "conntrack")
#: In nftables mode kube-proxy lists its table with each sync: with so many Services that takes longest.
MANY = 5000
SHORT, CHANGES = 500, 5
#: A run is seen from its first tool on; kube-proxy's own time has the computing before that besides.
LEAST_SHARE = 0.4


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.timeout(900)
def test_phases_add_up_to_the_run(
    mode: Mode,
    plane: ControlPlane,
    kube_namespace: str,
    start_kube_proxy: Callable[..., KubeProxy],
    start_kptrace: Callable[..., Kptrace],
    request: pytest.FixtureRequest,
) -> None:
    """Within 5 %, of five syncs of one change each; they last as long as kube-proxy's own syncs, or somewhat less."""
    services = MANY if request.config.getoption("--long") else SHORT
    specs = list(make_services(services, 2, namespace=kube_namespace))
    plane.client.create_all(manifests.objects(specs))
    proxy = start_kube_proxy(mode, min_sync_period="1s")
    kptrace = start_kptrace()

    def committed(scrape: Scrape) -> int:
        return scrape.distribution(DURATION, outcome="committed", **WHO).count

    kptrace.quiet()
    before, own_before = kptrace.scrape(), proxy.scrape()
    for step in range(1, CHANGES + 1):
        begin = time.time()
        plane.client.replace(manifests.objects([change_endpoint(specs[0], step)])[1])
        proxy.wait_synced(begin, seconds=60.0)
    wait_for(lambda: committed(kptrace.scrape()) - committed(before) >= CHANGES, "the syncs", seconds=60.0)
    after, own_after = kptrace.scrape(), proxy.scrape()

    def gained(name: str, **labels: str) -> float:
        return after.total(f"{name}_sum", **WHO, **labels) - before.total(f"{name}_sum", **WHO, **labels)

    run = gained(DURATION, outcome="committed")
    took = {phase: gained(PHASE, phase=phase) for phase in PHASES}
    own = own_after.total(f"{OWN}_sum", ip_family="IPv4") - own_before.total(f"{OWN}_sum", ip_family="IPv4")
    shown = {phase: round(seconds / CHANGES * 1e3, 1) for phase, seconds in took.items() if seconds}
    print(
        f"{mode}, {services} Services: {run / CHANGES * 1e3:.1f} ms a run, {own / CHANGES * 1e3:.1f} its own; {shown}"
    )
    assert committed(after) - committed(before) == CHANGES
    assert abs(sum(took.values()) - run) <= 0.05 * run
    assert LEAST_SHARE * own <= run <= 1.05 * own
    if mode is Mode.NFTABLES and services >= MANY:
        assert max(took, key=took.__getitem__) == "list"
