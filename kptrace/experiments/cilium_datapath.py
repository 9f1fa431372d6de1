# SPDX-License-Identifier: Apache-2.0
"""A datapath with Cilium's program names on an embedded node: loaded, attached and replaced as the agent does.

```
client ── [cil_xdp_entry, cil_from_container ─> tail_handle_ipv4] clients │ node │ backends [cil_from_netdev] ── back ends
       <─ [tail_ipv4_to_endpoint <─ cil_to_container]                      sockets: [cil_sock4_connect, ...]
```
"""

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Final, Self

from kptrace.experiments.cilium_attach import Attachment, LinkHook, TcHook
from kptrace.experiments.cilium_layouts import CONTROLS, ENDPOINT, GLOBALS
from kptrace.experiments.cilium_maps import CiliumMaps
from kptrace.experiments.interrupts import unhurried
from kptrace.kernel.attach_datapath import attach_cgroup, attach_xdp, set_tail_call
from kptrace.kernel.btf_write import load_btf, program_btf
from kptrace.kernel.bytecode import Function, link
from kptrace.kernel.compile import Compiler, Request
from kptrace.kernel.load import AttachType, ProgramType, close_all, load_program
from kptrace.kernel.maps import Map, MapSpec, MapType
from kptrace.kernel.objects import program_info, set_pin

#: One for packets, one for sockets.
SOURCES: Final = ("datapath_fixture.bpf.c", "socket_fixture.bpf.c")
CALLS: Final = f"cilium_calls_{ENDPOINT:05d}"
_CALLS_SPEC: Final = MapSpec(CALLS, MapType.PROG_ARRAY, 4, 4, 50)
#: Tail-called programs by their index: CILIUM_CALL_IPV4_FROM_LXC and CILIUM_CALL_IPV4_TO_ENDPOINT.
_TAILS: Final[Mapping[str, int]] = MappingProxyType({"tail_handle_ipv4": 7, "tail_ipv4_to_endpoint": 13})
_PROTOCOL_IN_KEYS: Final = 0  # HOLE_PROTOCOL_IN_KEYS
_NO_ATTACH: Final = AttachType.NONE
_SOCKETS: Final = {
    "cil_sock4_connect": AttachType.CGROUP_INET4_CONNECT,
    "cil_sock4_sendmsg": AttachType.CGROUP_UDP4_SENDMSG,
    "cil_sock4_recvmsg": AttachType.CGROUP_UDP4_RECVMSG,
    "cil_sock4_getpeername": AttachType.CGROUP_INET4_GETPEERNAME,
    "cil_sock6_connect": AttachType.CGROUP_INET6_CONNECT,
    "cil_sock6_sendmsg": AttachType.CGROUP_UDP6_SENDMSG,
    "cil_sock6_recvmsg": AttachType.CGROUP_UDP6_RECVMSG,
    "cil_sock6_getpeername": AttachType.CGROUP_INET6_GETPEERNAME,
}
XDP: Final = "cil_xdp_entry"
#: Devices of `EmbeddedNode`.
CONTAINER_DEVICE: Final = "clients"
_NETWORK_DEVICE: Final = "backends"


def compile_datapath(compiler: Compiler) -> Mapping[str, Function]:
    """The programs by name.

    Raises:
        CompileError: BCC is missing.
        UnsupportedError: the kernel has no BTF.
    """
    functions: dict[str, Function] = {}
    for source in SOURCES:
        functions.update(compiler.build(Request(source)).functions)
    return MappingProxyType(functions)


@dataclass(frozen=True, slots=True)
class Options:
    """What is attached.

    Attributes:
        tcx: by tcx links, by clsact filters, or by what the kernel has (None).
        xdp: put `cil_xdp_entry` before the container's packets: it takes those to addresses of load balancers.
        cgroup: where connect() is translated; nowhere without.
    """

    tcx: bool | None = None
    xdp: bool = False
    cgroup: Path | None = None


@dataclass(slots=True)
class _Generation:
    """Programs of one load, and the map that their tail calls go through."""

    programs: dict[str, int] = field(default_factory=dict)
    calls: Map | None = None

    def close(self) -> None:
        close_all(list(self.programs.values()))
        self.programs.clear()
        if self.calls is not None:
            self.calls.close()
            self.calls = None


class CiliumDatapath:
    """Loaded and attached programs; a context manager that takes everything away.

    It is made, replaced and closed in the network namespace of the node, and belongs to the calling process until it is
    closed: where that dies, pinned links and tc filters stay, as Cilium's do.

    Attributes:
        programs: ids of the attached programs and of those that they tail-call, by name; `replace` changes them.
    """

    def __init__(self, maps: CiliumMaps, functions: Mapping[str, Function], options: Options) -> None:
        """Load and attach.

        Args:
            maps: what the programs look up; they outlive this.
            functions: of `compile_datapath`.
            options: what is attached.

        Raises:
            KernelError: the kernel refused something.
        """
        self._maps = maps
        self._functions = functions
        self._attachments: dict[str, Attachment] = {}
        self._calls_pin = maps.root / GLOBALS / CALLS
        self.programs: Mapping[str, int] = MappingProxyType({})
        self._cgroup = -1 if options.cgroup is None else os.open(options.cgroup, os.O_RDONLY)
        self._hooks = self._plan(options)
        self._generation = _Generation()
        try:
            self._generation = self._load()
            set_pin(self._calls_fd(self._generation), self._calls_pin)
            for name, hook in self._hooks.items():
                self._attachments[name] = hook.attach(self._generation.programs[name], name)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def replace(self) -> None:
        """What the agent does when it regenerates an endpoint: new programs with a new map of tail calls, then the switch."""
        before = self._generation
        after = self._load()
        try:
            pending = self._calls_pin.with_name(f"{CALLS}:pending")
            set_pin(self._calls_fd(after), pending)
            for name, attachment in self._attachments.items():
                attachment.replace(after.programs[name])
            pending.replace(self._calls_pin)
        finally:
            # Whatever was switched is held by its hook.
            self._generation = after
            before.close()

    def close(self) -> None:
        """Detach and unload. Idempotent."""
        with unhurried():
            while self._attachments:
                self._attachments.popitem()[1].close()
            self._calls_pin.unlink(missing_ok=True)
            self._generation.close()
            if self._cgroup >= 0:
                os.close(self._cgroup)
                self._cgroup = -1

    def _plan(self, options: Options) -> dict[str, TcHook | LinkHook]:
        """The hook of each program, with the pin of its link."""
        root = self._maps.root / "cilium"
        endpoint = root / f"endpoints/{ENDPOINT}/links"
        network = root / f"devices/{_NETWORK_DEVICE}/links"
        hooks: dict[str, TcHook | LinkHook] = {
            name: TcHook(device, ingress, folder / name, options.tcx)
            for name, device, ingress, folder in (
                ("cil_to_container", CONTAINER_DEVICE, False, endpoint),
                ("cil_from_container", CONTAINER_DEVICE, True, endpoint),
                ("cil_from_netdev", _NETWORK_DEVICE, True, network),
            )
        }
        if options.xdp:
            ifindex = socket.if_nametoindex(CONTAINER_DEVICE)
            pin = root / f"devices/{CONTAINER_DEVICE}/links" / XDP
            hooks[XDP] = LinkHook(lambda program: attach_xdp(program, ifindex, generic=True), pin)
        if self._cgroup >= 0:
            for name, kind in _SOCKETS.items():
                hooks[name] = self._socket_hook(kind, root / "socketlb/links/cgroup" / name)
        return hooks

    def _socket_hook(self, kind: AttachType, pin: Path) -> LinkHook:
        return LinkHook(lambda program: attach_cgroup(program, self._cgroup, kind), pin)

    def _load(self) -> _Generation:
        """Load the programs of all hooks, and what they tail-call."""
        made = _Generation()
        try:
            made.calls = Map(_CALLS_SPEC)
            fds = {**self._maps.fds, "calls": made.calls.fd}
            constants = {_PROTOCOL_IN_KEYS: int(CONTROLS[self._maps.version].protocol_in_keys)}
            for name in (*_TAILS, *self._hooks):
                code = link(self._functions[name], map_fds=fds, constants=constants)
                made.programs[name] = _load_one(name, code)
            for name, index in _TAILS.items():
                set_tail_call(made.calls.fd, index, made.programs[name])
            self.programs = MappingProxyType(
                {name: program_info(program).id for name, program in made.programs.items()}
            )
        except BaseException:
            made.close()
            raise
        return made

    @staticmethod
    def _calls_fd(generation: _Generation) -> int:
        if generation.calls is None:
            raise RuntimeError("a loaded generation has its map")
        return generation.calls.fd


def _load_one(name: str, code: bytes) -> int:
    kind, attach_type = ProgramType.SCHED_CLS, _NO_ATTACH
    if name == XDP:
        kind, attach_type = ProgramType.XDP, AttachType.XDP
    elif name in _SOCKETS:
        kind, attach_type = ProgramType.CGROUP_SOCK_ADDR, _SOCKETS[name]
    described = program_btf(name, kind)
    btf = load_btf(described.blob)
    try:
        return load_program(name, code, kind, attach_type, btf_fd=btf, function_info=described.function_info)
    finally:
        os.close(btf)
