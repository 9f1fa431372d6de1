# SPDX-License-Identifier: Apache-2.0
"""`kptrace explain service`: what a first packet to it walks and costs, its last changes, drift, and who wrote."""

import http.client
import json
import socket
from collections.abc import Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any

import click

from kptrace.cli import logs
from kptrace.cli.tables import rows_of
from kptrace.daemon.settings import DEFAULT_SOCKET
from kptrace.dataplanes.nftables.dump import open_channel
from kptrace.dataplanes.nftables.netlink import NetlinkError
from kptrace.dataplanes.nftables.service_dump import ServiceDump
from kptrace.dataplanes.service_walk import Step, Walk, find_walk
from kptrace.kernel.netns import NetworkNamespace
from kptrace.model.errors import UsageError
from kptrace.model.identity import Protocol, ServicePort
from kptrace.model.netfilter import DataPlane, IpFamily

_TIMEOUT_SECONDS = 10.0


@click.group(help="Say what is known of one thing.")
def command() -> None:
    """Hold the kinds of things."""


@command.command(
    help="Say what a first packet to the Service NAMESPACE/NAME walks and costs, and what changed."
)
@click.argument("service", metavar="NAMESPACE/NAME")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
@click.option(
    "--local-socket",
    type=click.Path(path_type=Path),
    default=DEFAULT_SOCKET,
    show_default=True,
    help="Where the daemon listens.",
)
@click.option("--netns", type=click.Path(path_type=Path), help="Network namespace that the daemon watches.")
def service(*, service: str, as_json: bool, local_socket: Path, netns: Path | None) -> int:
    """Ask the daemon, read the rules, print both."""
    logs.configure("console", "warning")
    namespace, slash, name = service.partition("/")
    if not (namespace and slash and name) or "/" in name:
        raise UsageError(f"{service!r} is not NAMESPACE/NAME", remedy="give for example default/kubernetes")
    known = ask(local_socket, f"/services/{namespace}/{name}")
    if known is None:
        raise UsageError(
            f"the daemon knows no Service {service}",
            remedy="see kptrace_identity_objects and /status: are Services watched, and listed?",
        )
    document = {**known, "walk": _walks(netns, namespace, name, known["ports"])}
    click.echo(json.dumps(document, indent=2) if as_json else _text(document))
    return 0


def ask(path: Path, what: str) -> dict[str, Any] | None:
    """One JSON document of the daemon; None where it has none.

    Raises:
        UsageError: no daemon answers there.
    """
    connection = http.client.HTTPConnection("localhost", timeout=_TIMEOUT_SECONDS)
    try:
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(_TIMEOUT_SECONDS)
        connection.sock.connect(str(path))
        connection.request("GET", what)
        response = connection.getresponse()
        body = response.read()
        if response.status == HTTPStatus.NOT_FOUND:
            return None
        if response.status != HTTPStatus.OK:
            raise UsageError(f"the daemon answered {response.status} to {what}", remedy="see its log")
        document = json.loads(body)
        return document if isinstance(document, dict) else None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise UsageError(
            f"no daemon answers at {path}: {error}",
            remedy="start 'kptrace run' as root, or name its socket by --local-socket",
        ) from error
    finally:
        connection.close()


def _walks(
    netns: Path | None, namespace: str, name: str, ports: list[Mapping[str, Any]]
) -> list[dict[str, object]]:
    """A row for each chain on the way to each port; a reason where the rules cannot be read."""
    with NetworkNamespace(netns).enter(), open_channel() as channel:
        dump = ServiceDump(channel)
        rows: list[dict[str, object]] = []
        for each in ports:
            port = ServicePort(namespace, name, each["port"], Protocol[each["protocol"]])
            for family in IpFamily:
                try:
                    walk = find_walk(dump, family, port)
                except NetlinkError as error:
                    rows.append({"port": port.port, "family": family.value, "chain": f"not read: {error}"})
                    continue
                rows += _rows(port, walk) if walk is not None else []
        return rows


def _rows(port: ServicePort, walk: Walk) -> list[dict[str, object]]:
    return [
        {
            "port": port.port,
            "dataplane": walk.dataplane.value,
            "family": step.family.value,
            "table": step.table,
            "chain": step.chain,
            "rules": step.rules,
            "position": _position(walk.dataplane, step),
        }
        for step in walk.steps
    ]


def _position(dataplane: DataPlane, step: Step) -> int | str:
    if step.position is None:
        return "not found"
    return step.position or ("by map" if dataplane is DataPlane.NFTABLES else "by chance")


def _text(document: Mapping[str, Any]) -> str:
    parts = [f"Service {document['service']}"]
    for title, value in document.items():
        if isinstance(value, list):
            parts.append(f"\n{title}\n{rows_of(value)}")
    return "\n".join(parts)
