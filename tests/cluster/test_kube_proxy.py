# SPDX-License-Identifier: Apache-2.0
"""kptrace's syncs beside the real kube-proxy's own account of them."""

import time
from collections.abc import Callable

from kptrace.experiments import manifests
from kptrace.experiments.services import change_endpoint, make_services
from tests.cluster.controlplane import ControlPlane
from tests.cluster.kptrace import Kptrace
from tests.cluster.kubeproxy import METRICS_PORT, KubeProxy, Mode
from tests.cluster.programs import kubernetes_version, wait_for

_CHANGES = 5


def test_both_count_the_same_syncs(
    plane: ControlPlane,
    kube_namespace: str,
    start_kube_proxy: Callable[..., KubeProxy],
    start_kptrace: Callable[..., Kptrace],
) -> None:
    """Its mode and version are told, and of syncs that both saw the difference is a part of kube-proxy's own duration."""
    specs = list(make_services(100, 2, namespace=kube_namespace))
    plane.client.create_all(manifests.objects(specs))
    mode = Mode.NFTABLES
    proxy = start_kube_proxy(mode)
    kptrace = start_kptrace("--kube-proxy-metrics", f"http://127.0.0.1:{METRICS_PORT}")

    def looks() -> float:
        return kptrace.scrape().total("kptrace_kube_proxy_scrapes_total", outcome="ok")

    wait_for(lambda: looks() >= 1, "the first look")
    info = {"proxy_mode": mode.proxy_mode, "proxy_version": kubernetes_version()}
    assert kptrace.scrape().total("kptrace_node_info", **info) == 1
    before = proxy.scrape().distribution("kubeproxy_sync_proxy_rules_duration_seconds", ip_family="IPv4")
    for step in range(1, _CHANGES + 1):
        begin = time.time()
        plane.client.replace(manifests.objects([change_endpoint(specs[0], step)])[1])
        proxy.wait_synced(begin)
    after = proxy.scrape().distribution("kubeproxy_sync_proxy_rules_duration_seconds", ip_family="IPv4")
    name = "kptrace_kube_proxy_sync_difference_seconds"
    wait_for(
        lambda: bool(kptrace.scrape().lines(name, family="ipv4")),
        "a difference",
        seconds=60.0,
        detail=lambda: "\n".join(kptrace.scrape().lines("kptrace_kube_proxy_syncs_total")),
    )
    difference = kptrace.scrape().total(name, family="ipv4")
    assert after.count - before.count == _CHANGES
    counted = kptrace.scrape().total("kptrace_kube_proxy_syncs_total", family="ipv4", counted_by="kptrace")
    print(f"{mode}: {difference * 1e3:.1f} ms, {counted:.0f} syncs")
    assert abs(difference) < 1.0
