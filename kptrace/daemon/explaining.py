# SPDX-License-Identifier: Apache-2.0
"""Everything that the daemon knows of one Service, for the local socket. Pure."""

from collections.abc import Iterable, Mapping

from kptrace.daemon.part import Explain
from kptrace.daemon.recent import FlightRecorder
from kptrace.model.identity import ServicePort, Snapshot


def explain_service(
    service: tuple[str, str], snapshot: Snapshot, recorder: FlightRecorder, parts: Iterable[Explain]
) -> Mapping[str, object] | None:
    """JSON values by title; None for a Service that nobody knows.

    Args:
        service: namespace and name.
        snapshot: the names.
        recorder: the slow and the failed.
        parts: what signals know.
    """
    ports = _ports(service, snapshot)
    if not ports:
        return None
    found: dict[str, object] = {"service": "/".join(service), "ports": ports}
    for part in parts:
        found.update(part(*service))
    prefix = "/".join(service) + ":"
    records = [row for row in recorder.rows(names=True) if _touches(row["services"], prefix)]
    return {**found, "records": records}


def _touches(services: object, prefix: str) -> bool:
    return isinstance(services, list) and any(str(each).startswith(prefix) for each in services)


def _ports(service: tuple[str, str], snapshot: Snapshot) -> list[Mapping[str, object]]:
    addresses: dict[ServicePort, list[str]] = {}
    for address, port in snapshot.services.items():
        if (port.namespace, port.name) == service:
            where = f"[{address.ip}]" if ":" in address.ip else address.ip
            addresses.setdefault(port, []).append(f"{where}:{address.port}")
    node_ports = {
        port: number
        for (number, _), port in snapshot.node_ports.items()
        if (port.namespace, port.name) == service
    }
    return [
        {
            "port": port.port,
            "protocol": port.protocol.name,
            "addresses": sorted(addresses.get(port, ())),
            "node port": node_ports.get(port, 0),
            "endpoints": [
                {"address": f"{end.ip}:{end.port}", "node": end.node, "pod": end.pod, "ready": end.ready}
                for end in snapshot.endpoints.get(port, ())
            ],
        }
        for port in sorted({*addresses, *node_ports})
    ]
