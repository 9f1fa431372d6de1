# SPDX-License-Identifier: Apache-2.0
"""Drift under the real kube-proxy: what the API wants and the kernel lacks, and the other way round."""

import os
import signal
from collections.abc import Callable

import pytest

from tests.cluster.kubeproxy import Mode
from tests.cluster.programs import wait_for
from tests.cluster.setting import Setting, ends

AFTER_SECONDS = 4
DRIFT = "kptrace_service_drift"
READINGS = "kptrace_service_drift_readings_total"


@pytest.mark.parametrize("mode", [Mode.NFTABLES, Mode.IPTABLES_NFT])
@pytest.mark.timeout(300)
def test_what_a_stopped_kube_proxy_leaves_undone_is_drift(
    mode: Mode, start_setting: Callable[..., Setting]
) -> None:
    """While kube-proxy stands still, a new endpoint and one that went make one Service drift; afterwards none does."""
    setting = start_setting(mode, options=("--drift-after", str(AFTER_SECONDS)))

    def drift() -> float:
        return setting.kptrace.scrape().total(DRIFT, family="ipv4")

    def readings() -> float:
        return setting.kptrace.scrape().total(READINGS, result="compared")

    wait_for(lambda: readings() >= 2, "two readings")
    assert drift() == 0
    os.kill(setting.proxy.program.pid, signal.SIGSTOP)
    try:
        setting.scale(ends(1, first=7))
        wait_for(lambda: drift() == 1, "drift", seconds=60)
        (row,) = setting.kptrace.status()["drifting"]
        assert row["service"] == f"{setting.web.full_name}/tcp"
        assert "lacks 10.246.0.8:8080" in row["differences"]
        besides = [each for each in row["differences"] if each.endswith("besides")]
        assert len(besides) == (1 if mode is Mode.NFTABLES else 0)
    finally:
        os.kill(setting.proxy.program.pid, signal.SIGCONT)
    wait_for(lambda: drift() == 0, "no drift", seconds=60)
    assert setting.kptrace.status()["drifting"] == []
