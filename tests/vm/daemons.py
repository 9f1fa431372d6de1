# SPDX-License-Identifier: Apache-2.0
"""The image's daemon on a test's namespace, and packets for it to count."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kptrace.experiments.daemon_process import DaemonProcess, DaemonRequest, default_command
from kptrace.experiments.netns import Namespace
from tests.native import traffic

PORT = 5353
NO_SERVICES = '{"apiVersion": "v1", "kind": "List", "items": []}'
#: To compile takes a second on a node, and up to a minute here while another machine uses the other core.
READY_SECONDS = 200.0


@contextmanager
def running(namespace: Namespace, folder: Path, *options: str) -> Iterator[DaemonProcess]:
    """A ready daemon; it ends with the block, and never with a traceback."""
    identity, log = folder / "identity.json", folder / "log"
    identity.write_text(NO_SERVICES)
    request = DaemonRequest(namespace.path, identity, folder / "ready")
    argv = ["kptrace", *default_command(request)[3:], *options]
    try:
        with DaemonProcess(argv, request.ready_file, log, ready_seconds=READY_SECONDS) as process:
            yield process
    finally:
        text = log.read_text()
        print(text)
    assert "Traceback" not in text


def send(namespace: Namespace, packets: int) -> None:
    """Datagrams of one flow over the loopback."""

    def run() -> None:
        with traffic.udp_sink(socket.AF_INET, PORT):
            traffic.udp_one_flow(socket.AF_INET, PORT, packets)

    namespace.call(run)
