# SPDX-License-Identifier: Apache-2.0
"""An agent like Cilium's as a process of its own: it makes the maps, loads the datapath and writes Services as it is told.

`python -m kptrace.experiments.cilium_agent --bpffs ROOT ...`, in the node's network namespace. Each line of its standard
input is a command, each line of its output the answer, both JSON; `{"ready": ...}` comes first. It cleans up when its input
ends. `cilium_process.AgentProcess` speaks to it.
"""

import argparse
import json
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kptrace.experiments.cilium_datapath import CONTAINER_DEVICE, CiliumDatapath, Options, compile_datapath
from kptrace.experiments.cilium_layouts import SERVICES, Version
from kptrace.experiments.cilium_maps import CiliumMaps
from kptrace.experiments.cilium_writer import CiliumWriter, MapsWritten
from kptrace.experiments.interrupts import interruptible
from kptrace.experiments.services import PLANS, ServiceSpec
from kptrace.kernel.compile import Compiler
from kptrace.kernel.host import Host
from kptrace.model.errors import KptraceError
from kptrace.model.identity import Endpoint, Protocol, ServiceAddress, ServicePort
from kptrace.model.netfilter import IpFamily


def to_json(service: ServiceSpec) -> list[Any]:
    """What a command has for a Service: all that is written of it."""
    external = None if service.external is None else service.external.ip
    port, address = service.port, service.address
    endpoints = [[e.ip, e.port, e.ready, e.serving, e.terminating] for e in service.endpoints]
    name = [port.namespace, port.name, port.port]
    return [name, int(address.protocol), address.ip, address.port, external, endpoints]


def from_json(found: Sequence[Any]) -> ServiceSpec:
    """The Service of `to_json`."""
    (namespace, name, port_name), number, ip, port, external, endpoints = found
    protocol = Protocol(number)
    return ServiceSpec(
        ServicePort(namespace, name, port_name, protocol),
        ServiceAddress(ip, port, protocol),
        tuple(
            Endpoint(where, at, ready=ready, serving=serving, terminating=terminating)
            for where, at, ready, serving, terminating in endpoints
        ),
        None if external is None else ServiceAddress(external, port, protocol),
    )


class Agent:
    """The commands."""

    def __init__(self, writer: CiliumWriter, datapath: CiliumDatapath | None) -> None:
        """Write by the writer, regenerate the datapath, if there is one."""
        self._writer = writer
        self._datapath = datapath
        self._commands: Mapping[str, Callable[..., MapsWritten]] = {
            "install": lambda services: writer.install([from_json(each) for each in services]),
            "replace": lambda index, service: writer.replace(index, from_json(service)),
            "churn": lambda changes, seed: writer.churn(changes, seed=seed),
            "remove": writer.remove,
            "regenerate": self._regenerate,
        }

    @property
    def programs(self) -> dict[str, int]:
        """Ids of the programs by name."""
        return {} if self._datapath is None else dict(self._datapath.programs)

    def obey(self, line: str) -> dict[str, Any]:
        """Do what a line of input says; the answer says when, in CLOCK_MONOTONIC."""
        name, *arguments = json.loads(line)
        begin = time.monotonic_ns()
        written = self._commands[name](*arguments)
        end = time.monotonic_ns()
        return {
            "written": asdict(written),
            "began_ns": begin,
            "ended_ns": end,
            "programs": self.programs,
        }

    def _regenerate(self) -> MapsWritten:
        if self._datapath is None:
            raise KptraceError("there are no programs", remedy="start the agent with them")
        self._datapath.replace()
        return MapsWritten()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="cilium-agent")
    parser.add_argument("--bpffs", type=Path, required=True)
    parser.add_argument("--version", type=Version, default=Version.CURRENT)
    parser.add_argument("--entries", type=int, default=SERVICES)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--attach", choices=("auto", "tcx", "clsact", "none"), default="auto")
    parser.add_argument("--xdp", action="store_true")
    parser.add_argument("--cgroup", type=Path)
    parser.add_argument("--batch", action="store_true")
    return parser.parse_args()


def _say(answer: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Obey until the input ends."""
    arguments = _arguments()
    host = Host()
    with interruptible(), ExitStack() as stack:
        maps = stack.enter_context(CiliumMaps(arguments.bpffs, arguments.version, entries=arguments.entries))
        datapath = None
        if arguments.attach != "none":
            plan = PLANS[IpFamily.IPV4]
            ifindex = socket.if_nametoindex(CONTAINER_DEVICE)
            maps.add_endpoint(str(plan.client_link[2]), ifindex, str(plan.cluster))
            functions = compile_datapath(Compiler(host.vmlinux_btf, arguments.cache))
            tcx = {"tcx": True, "clsact": False}.get(arguments.attach)
            options = Options(tcx, arguments.xdp, arguments.cgroup)
            datapath = stack.enter_context(CiliumDatapath(maps, functions, options))
        agent = Agent(CiliumWriter(maps, batch=arguments.batch), datapath)
        _say({"ready": agent.programs})
        for line in sys.stdin:
            try:
                answer = agent.obey(line)
            except KptraceError as error:
                answer = {"error": error.one_line()}
            _say(answer)


if __name__ == "__main__":
    main()
