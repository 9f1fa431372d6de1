# SPDX-License-Identifier: Apache-2.0
"""Which netfilter BPF links exist, of any process: each holds its priority against everybody else's."""

import os
import struct
from dataclasses import dataclass
from typing import Final

from kptrace.kernel.object_ids import ObjectKind, describe, object_ids, open_object

_LINK_TYPE_NETFILTER: Final = 10
#: `struct bpf_link_info` up to its netfilter member: type, id, prog_id, padding; pf, hooknum, priority, flags.
_INFO: Final = struct.Struct("=III4xIIiI")


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
    for identifier in object_ids(ObjectKind.LINK):
        link = _link(identifier)
        if link is not None:
            found.append(link)
    return tuple(found)


def _link(identifier: int) -> NetfilterLink | None:
    """The link with this id; None if it is of another kind, or gone."""
    fd = open_object(ObjectKind.LINK, identifier)
    if fd is None:
        return None
    try:
        info, _ = describe(fd)
    finally:
        os.close(fd)
    kind, number, program, nfproto, hook, priority, flags = _INFO.unpack_from(info)
    if kind != _LINK_TYPE_NETFILTER:
        return None
    return NetfilterLink(number, program, nfproto, hook, priority, flags)
