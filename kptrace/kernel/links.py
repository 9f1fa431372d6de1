# SPDX-License-Identifier: Apache-2.0
"""Which netfilter BPF links exist, of any process: each holds its priority against everybody else's."""

import ctypes
import errno
import os
import struct
from dataclasses import dataclass
from typing import Final

from kptrace.kernel.syscall import Command, bpf, bpf_inout
from kptrace.model.errors import KernelError

_LINK_TYPE_NETFILTER: Final = 10
#: `struct bpf_link_info` up to its netfilter member: type, id, prog_id, padding; pf, hooknum, priority, flags.
_INFO: Final = struct.Struct("=III4xIIiI")
_INFO_BYTES: Final = 128  # more than any kernel's structure so far; the kernel fills what it knows
_NEXT_ID: Final = struct.Struct("=III")
_GET_INFO: Final = struct.Struct("=IIQ")


@dataclass(frozen=True, slots=True)
class NetfilterLink:
    """One netfilter program linked into a hook. The kernel does not tell of which network namespace.

    Attributes:
        id: the link's, never used again.
        program: id of the program.
        nfproto: 2 for IPv4, 10 for IPv6.
        hook: `enum nf_inet_hooks`.
        priority: unique in its hook.
        flags: `BPF_F_NETFILTER_IP_DEFRAG` (1) or 0.
    """

    id: int
    program: int
    nfproto: int
    hook: int
    priority: int
    flags: int


def netfilter_links() -> tuple[NetfilterLink, ...]:
    """All netfilter links of the machine, by id; a link that goes away meanwhile is left out.

    Raises:
        KernelError: the caller may not list links (CAP_SYS_ADMIN), or the kernel has none (before v5.8).
    """
    found = []
    identifier = 0
    while (following := _next_id(identifier)) is not None:
        identifier = following
        link = _link(identifier)
        if link is not None:
            found.append(link)
    return tuple(found)


def _next_id(identifier: int) -> int | None:
    attr = bytearray(_NEXT_ID.pack(identifier, 0, 0))
    try:
        bpf_inout(Command.LINK_GET_NEXT_ID, attr)
    except KernelError as error:
        if error.errno == errno.ENOENT:
            return None
        raise
    return int(_NEXT_ID.unpack(attr)[1])


def _link(identifier: int) -> NetfilterLink | None:
    """The link with this id; None if it is of another kind, or gone."""
    try:
        fd = bpf(Command.LINK_GET_FD_BY_ID, _NEXT_ID.pack(identifier, 0, 0))
    except KernelError as error:
        if error.errno == errno.ENOENT:
            return None
        raise
    try:
        info = ctypes.create_string_buffer(_INFO_BYTES)
        bpf(Command.OBJ_GET_INFO_BY_FD, _GET_INFO.pack(fd, _INFO_BYTES, ctypes.addressof(info)))
    finally:
        os.close(fd)
    kind, number, program, nfproto, hook, priority, flags = _INFO.unpack_from(info)
    if kind != _LINK_TYPE_NETFILTER:
        return None
    return NetfilterLink(number, program, nfproto, hook, priority, flags)
