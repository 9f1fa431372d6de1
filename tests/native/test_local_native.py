# SPDX-License-Identifier: Apache-2.0
"""The local socket of the real daemon, and the flight recorder behind it."""

import http.client
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kptrace.experiments.daemon_process import DaemonProcess, DaemonRequest, default_command
from kptrace.experiments.netns import Namespace
from kptrace.model.errors import UnsupportedError
from tests.unit.export.fakes import get, until

NO_SERVICES = '{"apiVersion": "v1", "kind": "List", "items": []}'


class _Local(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=20)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(str(self._path))


def ask(path: Path, what: str) -> tuple[int, Any]:
    """Status and JSON value of one request."""
    connection = _Local(path)
    try:
        connection.request("GET", what)
        response = connection.getresponse()
        body = response.read()
        return response.status, json.loads(body) if response.status == http.HTTPStatus.OK else body
    finally:
        connection.close()


@pytest.fixture
def local(namespace: Namespace, tmp_path: Path) -> Iterator[tuple[Path, DaemonProcess]]:
    """A daemon with a local socket."""
    path = tmp_path / "kptrace.sock"
    (tmp_path / "none.json").write_text(NO_SERVICES)
    request = DaemonRequest(namespace.path, tmp_path / "none.json", tmp_path / "ready")
    argv = [*default_command(request), "--local-socket", str(path)]
    with DaemonProcess(argv, request.ready_file, tmp_path / "log") as process:
        yield path, process


def test_a_failed_run_is_kept_with_what_is_known_of_it(
    local: tuple[Path, DaemonProcess], namespace: Namespace
) -> None:
    """An `nft` that fails is a record by number, and the exemplar of its duration's bucket."""
    path, daemon = local
    with pytest.raises(UnsupportedError, match="No such file"):
        namespace.run(["nft", "add rule ip nothere c counter"])
    assert until(lambda: bool(ask(path, "/status")[1]["records"]))
    (record,) = ask(path, "/status")[1]["records"]
    assert (record["kind"], record["why"], record["outcome"]) == ("sync", "failed", "failed")
    assert ask(path, f"/records/{record['id']}") == (200, record)
    assert ask(path, "/records/999")[0] == http.HTTPStatus.NOT_FOUND
    text = get(daemon.port, "/metrics", {"Accept": "application/openmetrics-text"})[2].decode()
    (line,) = [line for line in text.splitlines() if "# {record=" in line]
    assert line.startswith("kptrace_sync_duration_seconds_bucket{")
    assert f'# {{record="{record["id"]}"}}' in line


def test_the_socket_goes_with_the_daemon(namespace: Namespace, tmp_path: Path) -> None:
    """After SIGTERM nothing is left at its path."""
    path = tmp_path / "kptrace.sock"
    (tmp_path / "none.json").write_text(NO_SERVICES)
    request = DaemonRequest(namespace.path, tmp_path / "none.json", tmp_path / "ready")
    with DaemonProcess(
        [*default_command(request), "--local-socket", str(path)], request.ready_file, tmp_path / "log"
    ):
        assert path.is_socket()
    assert not path.exists()
