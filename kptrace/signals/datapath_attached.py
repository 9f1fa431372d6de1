# SPDX-License-Identifier: Apache-2.0
"""Which programs BPF links have at hooks now."""

import os

from kptrace.kernel.objects import LinkType, link_ids, link_info, open_link

_DATAPATH = frozenset({LinkType.CGROUP, LinkType.XDP, LinkType.TCX, LinkType.NETKIT})


def linked_programs() -> frozenset[int]:
    """Ids of the programs that links have at devices and cgroups.

    Filters of tc, and programs that older agents attach without links, are not among them.

    Raises:
        KernelError: the caller may not list links (CAP_SYS_ADMIN), or the kernel has none (before v5.8).
    """
    programs = set()
    for number in link_ids():
        fd = open_link(number)
        if fd is None:
            continue
        try:
            info = link_info(fd)
        finally:
            os.close(fd)
        if info.type in _DATAPATH:
            programs.add(info.program)
    return frozenset(programs)
