# SPDX-License-Identifier: Apache-2.0
"""What bpf/include/kptrace/task.h needs of the kernel's BTF. Pure."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

RDONLY_CAST: Final = "KPT_KFUNC_RDONLY_CAST"

#: Facts of a `kptrace.kernel.compile.Request` whose source includes task.h.
TASK_FACTS: Final[Mapping[str, str]] = MappingProxyType(
    {
        RDONLY_CAST: "?func:bpf_rdonly_cast",
        "KPT_TASK": "struct:task_struct",
        "KPT_TASK_NSPROXY": "offset:task_struct:nsproxy",
        "KPT_TASK_PARENT": "offset:task_struct:real_parent",
        "KPT_TASK_TGID": "offset:task_struct:tgid",
        "KPT_TASK_FILES": "offset:task_struct:files",
        "KPT_NSPROXY": "struct:nsproxy",
        "KPT_NSPROXY_NET": "offset:nsproxy:net_ns",
        "KPT_NSPROXY_MNT": "offset:nsproxy:mnt_ns",
        "KPT_NET": "struct:net",
        "KPT_NET_INUM": "offset:net:ns.inum",
        "KPT_MNT": "struct:mnt_namespace",
        "KPT_MNT_INUM": "offset:mnt_namespace:ns.inum",
        "KPT_FILES": "struct:files_struct",
        "KPT_FILES_FDT": "offset:files_struct:fdt",
        "KPT_FDTABLE": "struct:fdtable",
        "KPT_FDTABLE_MAX": "offset:fdtable:max_fds",
        "KPT_FDTABLE_FD": "offset:fdtable:fd",
        "KPT_FILE": "struct:file",
        "KPT_FILE_INODE": "offset:file:f_inode",
        "KPT_FILE_PRIVATE": "offset:file:private_data",
        "KPT_INODE": "struct:inode",
        "KPT_INODE_MODE": "offset:inode:i_mode",
        "KPT_SOCKET": "struct:socket",
        "KPT_SOCKET_SK": "offset:socket:sk",
        "KPT_PT_REGS": "struct:pt_regs",
    }
)


def kfuncs(values: Mapping[str, int]) -> Mapping[int, int]:
    """Placeholder number to BTF id of the kernel functions that task.h calls, of compiled facts."""
    return {0: values[RDONLY_CAST]} if RDONLY_CAST in values else {}
