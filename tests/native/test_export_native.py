# SPDX-License-Identifier: Apache-2.0
"""A real Prometheus against the real server, with every metric that kptrace has, in a namespace of the test's own."""

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

import pytest

from kptrace.experiments.netns import Namespace
from kptrace.export.listen import listen_tcp
from kptrace.export.registry import SPECS, Exporter
from kptrace.export.selfmetrics import SPECS as SELF_SPECS
from kptrace.export.selfmetrics import SelfMetrics
from kptrace.export.server import MetricsServer, TlsFiles
from kptrace.export.status import StatusPage
from kptrace.model.metrics import HistogramSample, MetricFamily, MetricSpec, Sample
from kptrace.model.signal import MechanismState, State
from tests.unit.export.fakes import FakeSource, get, until
from tests.unit.export.test_catalogue import all_specs
from tests.unit.export.test_tls import make_pair

pytestmark = pytest.mark.skipif(
    not (shutil.which("prometheus") and shutil.which("openssl")), reason="needs prometheus and openssl"
)

PROMETHEUS_PORT = 9090
#: What the Prometheus operator and its usual relabelling give a target.
TARGET_LABELS = ("namespace", "pod", "service", "container", "endpoint", "node")
CONFIG = """
global: {{scrape_interval: 1s, scrape_timeout: 1s}}
scrape_configs:
- {{job_name: one, static_configs: [&target {{targets: ["127.0.0.1:{plain}"], labels: {{{labels}}}}}]}}
- {{job_name: two, static_configs: [*target]}}
- job_name: secure
  scheme: https
  tls_config: {{ca_file: {folder}/ca.crt, cert_file: {folder}/client.crt, key_file: {folder}/client.key}}
  static_configs: [{{targets: ["127.0.0.1:{secure}"]}}]
- job_name: stranger
  scheme: https
  tls_config: {{ca_file: {folder}/ca.crt}}
  static_configs: [{{targets: ["127.0.0.1:{secure}"]}}]
"""


def filled(spec: MetricSpec) -> MetricFamily:
    """One sample of a metric, its labels named after themselves."""
    labels = tuple(f"a {label}" for label in spec.labels)
    if spec.kind == "histogram":
        return MetricFamily(spec, [HistogramSample(labels, ((5e-07, 1), (2.0, 16), (math.inf, 17)), 3.5)])
    return MetricFamily(spec, [Sample(labels, 17.0)])


@pytest.fixture
def everything() -> Exporter:
    """Every metric of kptrace."""
    own = {spec.name for spec in (*SPECS, *SELF_SPECS)}
    specs = {spec.name: spec for _, spec in all_specs() if spec.name not in own}
    source = FakeSource("all", *map(filled, specs.values()))
    state = MechanismState("lookup", "bracket", State.ACTIVE)
    self_metrics = SelfMetrics(lambda: [state], lambda: {("daemon", "callback_failed"): 0})
    return Exporter(lambda: (source, self_metrics))


@pytest.fixture
def servers(
    namespace: Namespace, everything: Exporter, tmp_path: Path
) -> Iterator[tuple[MetricsServer, MetricsServer]]:
    """The exporter by HTTP, and by HTTPS for clients with a certificate."""
    make_pair(tmp_path, "ca")
    for name in ("server", "client"):
        make_pair(tmp_path, name, ca="ca")
    tls = TlsFiles(tmp_path / "server.crt", tmp_path / "server.key", tmp_path / "ca.crt")
    made = [
        namespace.call(
            lambda files=files: MetricsServer(
                listen_tcp(("127.0.0.1", 0)), everything, StatusPage(list, dict), lambda: True, files
            )
        )
        for files in (None, tls)
    ]
    for server in made:
        server.start()
    yield made[0], made[1]
    for server in made:
        server.close()


def test_a_real_prometheus_scrapes(
    servers: tuple[MetricsServer, MetricsServer], namespace: Namespace, tmp_path: Path
) -> None:
    """Two scrapers at once see the same, a third by mutual TLS too, a stranger nothing; no label collides."""
    config = tmp_path / "prometheus.yml"
    labels = ", ".join(f"{label}: target" for label in TARGET_LABELS)
    config.write_text(
        CONFIG.format(plain=servers[0].port, secure=servers[1].port, folder=tmp_path, labels=labels)
    )
    namespace.popen(
        [
            "prometheus", f"--config.file={config}", f"--storage.tsdb.path={tmp_path / 'tsdb'}",
            f"--web.listen-address=127.0.0.1:{PROMETHEUS_PORT}", "--log.level=error",
        ]
    )  # fmt: skip

    def ask(path: str) -> list[dict[str, dict[str, str]]] | list[str]:
        with suppress(OSError):
            status, _, body = namespace.call(lambda: get(PROMETHEUS_PORT, path))
            if status == 200:
                data = json.loads(body)["data"]
                return list(data["result"] if isinstance(data, dict) else data)
        return []

    def by_job(query: str) -> dict[str, float]:
        rows = ask(f"/api/v1/query?query={quote(query)}")
        return {row["metric"]["job"]: float(row["value"][1]) for row in rows if isinstance(row, dict)}

    good = {"one": 1.0, "two": 1.0, "secure": 1.0}
    assert until(lambda: by_job("up") == {**good, "stranger": 0.0}, 60), by_job("up")
    specs = {spec.name: spec for _, spec in all_specs() if spec.name not in {s.name for s in SPECS}}
    for name, spec in specs.items():
        shown = f"{name}_count" if spec.kind == "histogram" else name
        assert by_job(f"count by (job) ({shown})").keys() == good.keys(), name
        if spec.kind == "histogram":
            assert by_job(f"max by (job) ({shown})") == dict.fromkeys(good, 17.0)
            assert by_job(f"max by (job) ({name}_sum)") == dict.fromkeys(good, 3.5)
    everywhere = by_job("scrape_samples_scraped")
    assert everywhere["one"] == everywhere["two"] == everywhere["secure"]
    assert by_job("max by (job) (kptrace_series)")["one"] == everywhere["one"]
    assert [name for name in ask("/api/v1/labels") if str(name).startswith("exported_")] == []


def test_curl_scrapes(
    servers: tuple[MetricsServer, MetricsServer], namespace: Namespace, tmp_path: Path
) -> None:
    """curl, by HTTP and with a client certificate, gets the metrics whole and compressed."""
    plain = namespace.run(["curl", "-sS", "--fail", f"http://127.0.0.1:{servers[0].port}/metrics"])
    pair = ["--cert", str(tmp_path / "client.crt"), "--key", str(tmp_path / "client.key")]
    trusted = ["curl", "-sS", "--fail", "--compressed", "--cacert", str(tmp_path / "ca.crt")]
    secure = namespace.run([*trusted, *pair, f"https://127.0.0.1:{servers[1].port}/metrics"])
    assert len(plain.splitlines()) == len(secure.splitlines()) > 20
