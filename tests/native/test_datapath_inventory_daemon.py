# SPDX-License-Identifier: Apache-2.0
"""The daemon beside a large node's Cilium: its scrapes stay small and fast, and it agrees with the agent's own metrics."""

import http.server
import json
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kptrace.experiments.cilium_layouts import LAYOUTS, MapName, Version
from kptrace.experiments.cilium_maps import BpfFilesystem, CiliumMaps
from kptrace.experiments.cilium_process import AgentProcess, AgentRequest
from kptrace.experiments.daemon_process import DaemonProcess, DaemonRequest, default_command
from kptrace.experiments.netns import Namespace
from kptrace.experiments.scrape import Scrape, fetch, parse
from kptrace.experiments.services import make_services
from tests.native import inventory_bench
from tests.native.inventory_bench import BACKENDS, SERVICES, dumped

NO_SERVICES = '{"apiVersion": "v1", "kind": "List", "items": []}'
SCRAPE_SECONDS, SCRAPE_BYTES = 0.050, 1 << 20


@pytest.fixture
def daemon(namespace: Namespace, tmp_path: Path) -> Iterator[Callable[..., DaemonProcess]]:
    """Start a daemon that sees a BPF file system of the test's own where the node's is."""
    started: list[DaemonProcess] = []

    def start(bpffs: Path, *extra: str) -> DaemonProcess:
        identity = tmp_path / "identity.json"
        identity.write_text(NO_SERVICES)
        request = DaemonRequest(namespace.path, identity, tmp_path / f"ready{len(started)}")
        inside = 'mount --bind "$0" /sys/fs/bpf && exec "$@"'
        argv = ["unshare", "--mount", "sh", "-c", inside, str(bpffs), *default_command(request), *extra]
        argv += ["--cache-dir", str(tmp_path / "cache")]
        process = DaemonProcess(argv, request.ready_file, tmp_path / f"log{len(started)}")
        process.__enter__()
        started.append(process)
        return process

    yield start
    for each in started:
        each.stop()


def value(scrape: Scrape, name: str, **labels: str) -> float | None:
    """The one sample, if it is there."""
    return next((each.value for each in parse(scrape.text) if each.matches(name, labels)), None)


def scrape_until(process: DaemonProcess, enough: Callable[[Scrape], bool], seconds: float) -> Scrape:
    """Scrape twice a second until a condition holds, or time is up: the last scrape either way."""
    deadline = time.monotonic() + seconds
    while not enough(latest := process.scrape()) and time.monotonic() < deadline:
        time.sleep(0.5)
    return latest


def test_a_large_nodes_scrape_is_within_its_budget(daemon: Callable[..., DaemonProcess]) -> None:
    """10,000 Services and 50,000 back ends: exact figures in 1 MiB and 50 ms, while the maps are read too."""
    with BpfFilesystem() as mounted, CiliumMaps(mounted.root) as maps:
        inventory_bench.fill(maps)
        process = daemon(mounted.root)
        seconds = []

        def shown(scrape: Scrape) -> bool:
            return value(scrape, "kptrace_datapath_services", family="ipv4") is not None

        for _ in range(100):
            begin = time.perf_counter()
            status, text = fetch(process.port)
            seconds.append(time.perf_counter() - begin)
            assert status == 200
            assert len(text.encode()) < SCRAPE_BYTES
            time.sleep(0.05)
        scrape = scrape_until(process, shown, 30)
        page = json.loads(fetch(process.port, "/status?format=json")[1])
        (row,) = (row for row in page["datapath inventory"] if row["map"] == "lb4_backends")
        assert (row["maps"], row["entries"], row["room"]) == (1, BACKENDS, 65536)
    times = f"median {statistics.median(seconds) * 1e3:.1f} ms, longest {max(seconds) * 1e3:.1f} ms"
    print(f"{len(seconds)} scrapes from the start on: {times}, {len(text)} bytes")
    assert statistics.median(seconds) < SCRAPE_SECONDS
    assert value(scrape, "kptrace_datapath_services", family="ipv4") == SERVICES
    assert value(scrape, "kptrace_datapath_backends", family="ipv4") == BACKENDS
    own = value(scrape, "kptrace_collector_duration_seconds", collector="datapath_inventory")
    assert own is not None
    assert own < SCRAPE_SECONDS / 10


class Agent:
    """A stand-in for the metrics server of Cilium's agent, with its text."""

    def __init__(self) -> None:
        self.counts: dict[tuple[str, str], int] = {}
        agent = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:  # the name that http.server asks for
                body = agent.text().encode() if self.path == "/metrics" else b""
                self.send_response(200 if body else 404)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        self.server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)

    def text(self) -> str:
        """As an agent of 1.18 writes it."""
        lines = [
            "# HELP cilium_bpf_map_ops_total Number of eBPF map operations performed",
            "# TYPE cilium_bpf_map_ops_total counter",
            *(
                f'cilium_bpf_map_ops_total{{map_name="{name}",operation="{operation}",outcome="success"}} {count}'
                for (name, operation), count in self.counts.items()
            ),
            "# TYPE cilium_version gauge",
            'cilium_version{arch="amd64",revision="0000000",version="1.18.2"} 1',
        ]
        return "\n".join(lines) + "\n"


@pytest.fixture
def agent(namespace: Namespace) -> Iterator[Agent]:
    """The stand-in, within the watched namespace."""
    made = namespace.call(Agent)
    made.thread.start()
    yield made
    made.server.shutdown()
    made.server.server_close()
    made.thread.join()


def test_the_agents_own_counts_are_ours(
    daemon: Callable[..., DaemonProcess], namespace: Namespace, agent: Agent
) -> None:
    """What it wrote is what we saw: no difference; what it claims beyond that is one."""
    installed = {
        MapName.SERVICES4: "lb4_services_v2",
        MapName.BACKENDS4: "lb4_backends_v3",
        MapName.REVERSE_NAT4: "lb4_reverse_nat",
    }
    roles = ("lb4_services", "lb4_backends", "lb4_reverse_nat")
    agent.counts = dict.fromkeys(((name, "update") for name in installed.values()), 1000)
    with AgentProcess(namespace, AgentRequest(attach="none", sockets=False)) as process:
        running = daemon(
            process.root, "--cilium-metrics", f"http://127.0.0.1:{agent.port}/metrics", "--log-level", "debug"
        )

        def differences(scrape: Scrape) -> list[float | None]:
            name = "kptrace_cilium_map_operations_difference"
            return [value(scrape, name, map=role, operation="update") for role in roles]

        scrape = scrape_until(running, lambda found: None not in differences(found), 90)
        assert differences(scrape) == [0, 0, 0]
        assert value(scrape, "kptrace_dataplane_info", dataplane="cilium", version="1.18.2") == 1
        process.install(make_services(50, 4))
        # Every entry of these was written once.
        for map_name, name in installed.items():
            pin = process.root / "tc/globals" / LAYOUTS[Version.CURRENT][map_name].name
            agent.counts[name, "update"] += len(dumped(pin))
        agent.counts["lb4_reverse_nat", "update"] += 5

        def seen(scrape: Scrape) -> bool:
            return value(
                scrape, "kptrace_cilium_map_operations_total", map="lb4_backends", counted_by="agent"
            ) == 1200 and differences(scrape)[2] not in (0, None)

        scrape = scrape_until(running, seen, 40)
        assert differences(scrape) == [0, 0, 5]
        counted = [
            value(
                scrape,
                "kptrace_cilium_map_operations_total",
                map=role,
                operation="update",
                counted_by="kptrace",
            )
            for role in roles
        ]
        assert counted == [250, 200, 50]
