# SPDX-License-Identifier: Apache-2.0
"""Attaching programs that handle packets and connections: by BPF links, which go away with their last descriptor."""

import struct

from kptrace.kernel.load import AttachType
from kptrace.kernel.maps import update_element
from kptrace.kernel.syscall import Command, bpf

_XDP_FLAGS_SKB_MODE = 1 << 1


def attach_tcx(program: int, ifindex: int, ingress: bool) -> int:
    """Link a SCHED_CLS program to a device of the calling thread's network namespace, after those already there.

    Linux kernel commit e420bed02507 ("bpf: Add fd-based tcx multi-prog infra with link support") (in v6.6).
    """
    kind = AttachType.TCX_INGRESS if ingress else AttachType.TCX_EGRESS
    return _link(program, ifindex, kind)


def attach_xdp(program: int, ifindex: int, *, generic: bool = False) -> int:
    """Link an XDP program to a device of the calling thread's network namespace.

    Args:
        program: descriptor.
        ifindex: of the device.
        generic: run it on whole packets, after the driver, whatever the driver can do.

    Linux kernel commit aa8d3a716b59 ("bpf, xdp: Add bpf_link-based XDP attachment API") (in v5.9).
    """
    return _link(program, ifindex, AttachType.XDP, _XDP_FLAGS_SKB_MODE if generic else 0)


def attach_cgroup(program: int, cgroup_fd: int, attach_type: AttachType) -> int:
    """Link a program to a cgroup (a descriptor of its directory), beside those already there.

    Linux kernel commit af6eea57437a ("bpf: Implement bpf_link-based cgroup BPF program attachment") (in v5.7).
    """
    return _link(program, cgroup_fd, attach_type)


def update_link(link: int, program: int) -> None:
    """Replace the program of a link at once: no packet passes by without either."""
    bpf(Command.LINK_UPDATE, struct.pack("=IIII", link, program, 0, 0))


def set_tail_call(map_fd: int, index: int, program: int) -> None:
    """Make the program the target of tail calls to this index of a PROG_ARRAY."""
    update_element(map_fd, struct.pack("=I", index), struct.pack("=I", program))


def _link(program: int, target: int, attach_type: AttachType, flags: int = 0) -> int:
    return bpf(Command.LINK_CREATE, struct.pack("=IIII", program, target, attach_type, flags) + bytes(48))
