# SPDX-License-Identifier: Apache-2.0
"""The kernel side of the lookup signal: its maps, and one loaded program per boundary.

The constants' numbers are those of bpf/lookup.bpf.c: 0 opens, 1 closes, 2 walk mask, 3 nfproto, 4 service plane.
"""

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from kptrace.kernel.attach import attach_netfilter, attach_raw_tracepoint
from kptrace.kernel.bytecode import Bytecode, link
from kptrace.kernel.compile import Request
from kptrace.kernel.host import Host
from kptrace.kernel.load import AttachType, ProgramType, load_program
from kptrace.kernel.maps import Map
from kptrace.model.netfilter import IpFamily
from kptrace.signals.lookup_maps import LookupMaps

NO_BRACKET = 0xFFFFFFFF
#: Maps whose only value the programs address directly, in the order of bpf/lookup.bpf.c.
VALUES = {0: "config", 1: "slots", 2: "counts"}

REQUEST = Request(
    "lookup.bpf.c",
    facts={
        "KPT_SKB_NFCT": "offset:sk_buff:_nfct",
        "KPT_NF_CONN_ID": "struct:nf_conn",
        "KPT_NF_CONN_STATUS": "offset:nf_conn:status",
        "KPT_REASON_NETFILTER_DROP": "enum:SKB_DROP_REASON_NETFILTER_DROP",
        "KPT_KFUNC_DYNPTR_FROM_SKB": "func:bpf_dynptr_from_skb",
        "KPT_KFUNC_RDONLY_CAST": "func:bpf_rdonly_cast",
    },
)


@dataclass(frozen=True, slots=True)
class BoundaryProgram:
    """What one boundary's program is to do; numbers are bracket numbers or `NO_BRACKET`.

    Attributes:
        closes, opens: brackets.
        walk_mask: the conntrack status bits that say that NAT is done at this hook; 0 where the rules of NAT are not
            walked.
        family: of the packets.
        plane: 1 + the data plane's place in `lookup_services.PLANES` where first packets are counted per service; 0
            where they are not.
    """

    closes: int
    opens: int
    walk_mask: int
    family: IpFamily
    plane: int


class LookupKernel(LookupMaps):
    """Maps and programs in the kernel; everything goes away with `close`, or with the process."""

    def __init__(self, bytecode: Bytecode, host: Host = Host()) -> None:
        """Make the maps; nothing is attached yet."""
        super().__init__(bytecode, host)
        self._kfuncs = {
            0: bytecode.values["KPT_KFUNC_DYNPTR_FROM_SKB"],
            1: bytecode.values["KPT_KFUNC_RDONLY_CAST"],
        }
        self._installed: dict[tuple[IpFamily, bytes], int] = {}

    def attach_drops(self) -> None:
        """Close the brackets of dropped packets through kfree_skb."""
        code = link(self._code.functions["lookup_drop"], map_fds=self._fds, values=VALUES)
        program = load_program("lookup_drop", code, ProgramType.RAW_TRACEPOINT)
        try:
            self._attached.append(attach_raw_tracepoint(program, "kfree_skb"))
        finally:
            os.close(program)

    def link_boundary(self, program: BoundaryProgram, hook: int, priority: int) -> int:
        """Load a boundary's program and link it in the calling thread's network namespace; return the link."""
        code = link(
            self._code.functions["lookup_boundary"],
            map_fds=self._fds,
            values=VALUES,
            kfuncs=self._kfuncs,
            constants={
                0: program.opens,
                1: program.closes,
                2: program.walk_mask,
                3: program.family.nfproto,
                4: program.plane,
            },
        )
        fd = load_program("lookup_boundary", code, ProgramType.NETFILTER, AttachType.NETFILTER)
        try:
            return attach_netfilter(fd, program.family.nfproto, hook, priority)
        finally:
            os.close(fd)  # the link holds it

    def set_services(self, wanted: Mapping[tuple[IpFamily, bytes], int]) -> None:
        """Make the maps of Service addresses hold exactly this: address key to service number."""
        for key in self._installed.keys() - wanted.keys():
            self._service_map(key[0]).delete(key[1])
            del self._installed[key]
        for key, number in wanted.items():
            if self._installed.get(key) != number:
                self._service_map(key[0]).update(key[1], struct.pack("=I", number))
                self._installed[key] = number

    def _service_map(self, family: IpFamily) -> Map:
        return self._maps["services4" if family is IpFamily.IPV4 else "services6"]
