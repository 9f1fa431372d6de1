# SPDX-License-Identifier: Apache-2.0
"""Which capabilities this process has, and which of those that kptrace uses it lacks."""

import re
from collections.abc import Iterable
from enum import IntEnum

from kptrace.kernel.host import Host
from kptrace.model.errors import KernelError


class Capability(IntEnum):
    """Bit numbers of the capabilities that kptrace uses, `CAP_` left out of the name."""

    NET_ADMIN = 12
    SYS_PTRACE = 19
    SYS_ADMIN = 21
    PERFMON = 38
    BPF = 39

    def __str__(self) -> str:
        return f"CAP_{self.name}"


# CAP_BPF and CAP_PERFMON were split off CAP_SYS_ADMIN (in v5.8), which still stands for both.
_COVERED_BY_SYS_ADMIN = frozenset({Capability.BPF, Capability.PERFMON})


def effective_capabilities(host: Host) -> int:
    """The calling process's effective capabilities as a bit mask.

    Raises:
        KernelError: procfs does not tell.
    """
    path = host.proc / "self/status"
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise KernelError(f"cannot read {path}: {error.strerror}", errno=error.errno or 0) from error
    match = re.search(r"^CapEff:\s*([0-9a-f]+)$", text, re.MULTILINE | re.ASCII)
    if not match:
        raise KernelError(f"{path} has no line CapEff")
    return int(match[1], 16)


def missing_capabilities(effective: int, wanted: Iterable[Capability]) -> list[Capability]:
    """Those of `wanted` that the mask neither has nor makes up for, in their given order."""
    return [
        each
        for each in wanted
        if not effective >> each & 1
        and not (each in _COVERED_BY_SYS_ADMIN and effective >> Capability.SYS_ADMIN & 1)
    ]
