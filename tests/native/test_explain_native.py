# SPDX-License-Identifier: Apache-2.0
"""`kptrace explain service` against real rules, real connections and the tools' own listings."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kptrace.experiments import traffic
from kptrace.experiments.daemon_process import DaemonProcess, DaemonRequest, default_command
from kptrace.experiments.manifests import identity_text
from kptrace.experiments.node import EmbeddedNode
from kptrace.experiments.services import ServiceSpec, make_services
from kptrace.experiments.writer import RuleWriter
from kptrace.model.netfilter import DataPlane, IpFamily
from tests.unit.export.fakes import until

SERVICES, WHICH, CONNECTIONS = 53, 31, 7


def explain(socket: Path, netns: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command."""
    argv = [sys.executable, "-m", "kptrace", "explain", "service", "--local-socket", str(socket)]
    return subprocess.run(
        [*argv, "--netns", str(netns), *arguments], capture_output=True, text=True, check=False, timeout=60
    )


def position(node: EmbeddedNode, spec: ServiceSpec) -> int:
    """Of the Service's rule in KUBE-SERVICES, as iptables lists it."""
    listed = node.node.run(["iptables-nft", "-t", "nat", "-S", "KUBE-SERVICES"]).splitlines()
    rules = [line for line in listed if line.startswith("-A ")]
    return 1 + next(n for n, rule in enumerate(rules) if f"-d {spec.address.ip}/32" in rule)


@pytest.mark.parametrize("dataplane", [DataPlane.NFTABLES, DataPlane.IPTABLES_NFT])
def test_a_service_is_explained(dataplane: DataPlane, tmp_path: Path) -> None:
    """Its back ends, as many look-ups as connections, and the chains with the rule's real position."""
    with EmbeddedNode() as node:
        services = make_services(SERVICES, 3)
        RuleWriter(node.node, dataplane).install(services)
        (tmp_path / "identity.json").write_text(identity_text(services), encoding="utf-8")
        request = DaemonRequest(node.node.path, tmp_path / "identity.json", tmp_path / "ready")
        argv = [*default_command(request), "--local-socket", str(tmp_path / "socket")]
        with DaemonProcess(argv, request.ready_file, tmp_path / "log"):
            spec = services[WHICH]
            sources = traffic.client_sources(IpFamily.IPV4)
            traffic.tcp_connections(node.client, [spec.address] * CONNECTIONS, sources)
            name = f"{spec.port.namespace}/{spec.port.name}"

            def asked() -> Any:
                run = explain(tmp_path / "socket", node.node.path, name, "--json")
                assert run.returncode == 0, run.stderr
                return json.loads(run.stdout)

            assert until(lambda: asked()["look-ups of first packets"] != [])
            document = asked()
            assert [(row["count"], row["dataplane"]) for row in document["look-ups of first packets"]] == [
                (CONNECTIONS, dataplane.value)
            ]
            (port,) = document["ports"]
            assert port["addresses"] == [f"{spec.address.ip}:{spec.address.port}"]
            assert {end["address"] for end in port["endpoints"]} == {
                f"{end.ip}:{end.port}" for end in spec.endpoints
            }
            steps = {step["chain"]: step for step in document["walk"]}
            if dataplane is DataPlane.IPTABLES_NFT:
                assert steps["KUBE-SERVICES"]["position"] == position(node, spec)
            else:
                assert steps["services"]["position"] == "by map"
                assert sum(chain.startswith("service-") for chain in steps) == 1
            unknown = explain(tmp_path / "socket", node.node.path, "demo/nobody")
            assert unknown.returncode == 2
            assert "knows no Service demo/nobody" in unknown.stderr


def test_without_a_daemon_there_is_a_remedy(tmp_path: Path) -> None:
    """Exit code 2, one line, no traceback."""
    run = explain(tmp_path / "socket", Path("/proc/self/ns/net"), "demo/web")
    assert run.returncode == 2
    assert "kptrace run" in run.stderr
    assert len(run.stderr.splitlines()) == 1
