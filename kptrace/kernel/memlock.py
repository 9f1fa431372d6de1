# SPDX-License-Identifier: Apache-2.0
"""The limit of locked memory, against which older kernels count BPF maps and programs."""

import resource


def raise_memlock() -> str:
    """Lift the limit for this process, and those that it starts; returns why not, or nothing.

    Since Linux kernel commit 3ac1f01b43b6 ("bpf: Eliminate rlimit-based memory accounting for bpf progs") (in v5.11) it is
    not needed, and a process that may not lift it (CAP_SYS_RESOURCE) loses nothing.
    """
    try:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    except (ValueError, OSError) as error:
        return f"RLIMIT_MEMLOCK stays: {error}"
    return ""
