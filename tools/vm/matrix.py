# SPDX-License-Identifier: Apache-2.0
"""Which kernels kptrace supports: one tuple that drives the test machines and docs/support.md. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from tools.vm.errors import VmError


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel to test on, and how to boot it.

    Attributes:
        name: what `make test-vm KERNEL=` takes; a folder of this name in build/vm has what came out.
        version: of the mainline kernel, as last seen; the harness takes the newest that its suite has.
        release: Debian's release, for people.
        suite: of the Debian archive.
        package: the package whose dependencies are the kernel.
        options: boot parameters.
        refuses: features of `kptrace.kernel.features.TABLE` that are refused although the version has them.
        ci: whether every change is tested on it; all are in `make acceptance`.
    """

    name: str
    version: str
    release: str
    suite: str
    package: str = "linux-image-amd64"
    options: tuple[str, ...] = ()
    refuses: tuple[str, ...] = ()
    ci: bool = True


_CONFIDENTIAL = ("lockdown=confidentiality",)
# What a confidential lockdown refuses (since 5.4): kprobes, which can read any kernel memory (LOCKDOWN_KPROBES), and
# tracefs, whose folders are empty then (LOCKDOWN_TRACEFS), so that no tracepoint has a number to open it by. Raw tracepoints
# need none.
_REFUSED = ("kprobe", "tracepoint")
# Helpers that read kernel memory are refused too (LOCKDOWN_BPF_READ_KERNEL), and bpf_rdonly_cast came after 6.1.
_REFUSED_WITHOUT_CAST = (*_REFUSED, "follow_pointers")

KERNELS: tuple[Kernel, ...] = (
    Kernel("5.10", "5.10", "Debian 11", "bullseye"),
    Kernel("6.1", "6.1", "Debian 12", "bookworm"),
    Kernel("6.12", "6.12", "Debian 13", "trixie"),
    Kernel("6.12-lockdown", "6.12", "Debian 13", "trixie", options=_CONFIDENTIAL, refuses=_REFUSED),
    Kernel("newest", "7.3", "Debian 13 backports", "trixie-backports"),
    Kernel(
        "6.1-lockdown",
        "6.1",
        "Debian 12",
        "bookworm",
        options=_CONFIDENTIAL,
        refuses=_REFUSED_WITHOUT_CAST,
        ci=False,
    ),
    Kernel("6.12-preempt", "6.12", "Debian 13", "trixie", options=("preempt=full",), ci=False),
    Kernel("6.12-rt", "6.12", "Debian 13", "trixie", package="linux-image-rt-amd64", ci=False),
)


def select(
    names: Sequence[str], *, everything: bool = False, kernels: Sequence[Kernel] = KERNELS
) -> list[Kernel]:
    """The kernels of these names; without names those of CI, or all.

    Raises:
        VmError: a name that is none of theirs.
    """
    by_name = {kernel.name: kernel for kernel in kernels}
    for name in names:
        if name not in by_name:
            raise VmError(f"there is no kernel {name!r}", remedy=f"one of: {', '.join(by_name)}", usage=True)
    if names:
        return [by_name[name] for name in names]
    return [kernel for kernel in kernels if everything or kernel.ci]
