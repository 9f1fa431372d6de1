# SPDX-License-Identifier: Apache-2.0
"""The vocabulary of feature probes: what a probe may use, and what it may answer.

A reason is what the probe saw (system call and errno, file and content), never an inference from it.
"""

import errno
import gzip
import os
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property

from kptrace.kernel import syscall
from kptrace.kernel.attach import open_kprobe
from kptrace.kernel.btf import Btf, BtfError
from kptrace.kernel.capabilities import Capability, effective_capabilities, missing_capabilities
from kptrace.kernel.host import Host
from kptrace.kernel.load import AttachType, ProgramType, load_program
from kptrace.kernel.tracefs import Tracefs
from kptrace.model.errors import KernelError, PrivilegeError

# Passing trouble of this process or node: it says nothing about the kernel.
_PASSING = frozenset({errno.ENOMEM, errno.EAGAIN, errno.EINTR, errno.EMFILE, errno.ENFILE, errno.EBUSY})


class State(StrEnum):
    """Whether the kernel has a feature."""

    SUPPORTED = "supported"
    UNSUPPORTED = "unsupported"
    INCONCLUSIVE = "inconclusive"


@dataclass(frozen=True, slots=True)
class Support:
    """A probe's answer.

    Attributes:
        state: whether the kernel has the feature.
        reason: short stable code, `ok` where it has.
        detail: what the probe saw.
    """

    state: State
    reason: str
    detail: str

    @classmethod
    def yes(cls, detail: str = "") -> "Support":
        """The probe succeeded."""
        return cls(State.SUPPORTED, "ok", detail)

    @classmethod
    def no(cls, reason: str, detail: str) -> "Support":
        """The kernel refused, or lacks what it needs."""
        return cls(State.UNSUPPORTED, reason, detail)

    @classmethod
    def unknown(cls, reason: str, detail: str) -> "Support":
        """Something kept the probe from telling."""
        return cls(State.INCONCLUSIVE, reason, detail)

    @property
    def supported(self) -> bool:
        """Whether the feature can be used."""
        return self.state is State.SUPPORTED


def load(
    code: bytes, kind: ProgramType, attach_type: AttachType = AttachType.NONE, attach_btf_id: int = 0
) -> int:
    """Load a probe's program; every refusal is a `KernelError` with its errno."""
    try:
        return load_program("kptrace_probe", code, kind, attach_type, attach_btf_id=attach_btf_id)
    except PrivilegeError as error:
        raise KernelError(str(error), errno=errno.EPERM) from error


def find_tracefs(host: Host) -> str:
    """Where tracefs was found; raises `UnsupportedError`."""
    tracefs = Tracefs(host.sys)
    tracefs.close()
    return tracefs.origin


@dataclass(frozen=True)
class Calls:
    """The system calls that probes make; each returns a descriptor that the probe closes."""

    load: Callable[..., int] = load
    bpf: Callable[[int, bytes], int] = syscall.bpf
    open_kprobe: Callable[[int, str], int] = open_kprobe
    find_tracefs: Callable[[Host], str] = find_tracefs
    close: Callable[[int], None] = os.close


@dataclass(frozen=True)
class Context:
    """What all probes of one run share: the host, the system calls, and what was read once."""

    host: Host
    calls: Calls = field(default_factory=Calls)

    @cached_property
    def btf(self) -> Btf | BtfError:
        """The kernel's BTF, or why there is none."""
        try:
            return Btf.load(self.host.vmlinux_btf)
        except BtfError as error:
            return error

    @cached_property
    def effective(self) -> int | KernelError:
        """This process's capabilities, or why they are not known."""
        try:
            return effective_capabilities(self.host)
        except KernelError as error:
            return error

    @cached_property
    def lockdown(self) -> str:
        """The lockdown file's content, or what reading it gave."""
        try:
            return f"lockdown: {self.host.lockdown.read_text().strip()}"
        except OSError as error:
            mounted = self.host.lockdown.parent.is_dir() and any(self.host.lockdown.parent.iterdir())
            where = "" if mounted else ", securityfs is not mounted there"
            return f"lockdown: {self.host.lockdown} {_errno_name(error.errno)}{where}"

    @cached_property
    def _kconfig(self) -> str | OSError:
        try:
            return gzip.decompress(self.host.kconfig.read_bytes()).decode(errors="replace")
        except (OSError, EOFError, zlib.error) as error:
            return error if isinstance(error, OSError) else OSError(errno.EIO, str(error))

    def kconfig(self, option: str) -> str:
        """An option of the kernel's configuration as it stands there, or what reading it gave."""
        if isinstance(self._kconfig, OSError):
            return f"{option}: {self.host.kconfig} {_errno_name(self._kconfig.errno)}"
        match = re.search(rf"^(?:# )?({re.escape(option)}(?:=.*| is not set))$", self._kconfig, re.MULTILINE)
        return match[1] if match else f"{option} is not in {self.host.kconfig}"

    def refusal(self, step: str, error: KernelError, needs: Sequence[Capability]) -> Support:
        """What a refused call means; `needs` are the capabilities without which EPERM says nothing of the kernel."""
        if error.errno == errno.ENOSYS:
            return Support.no("no_syscall", str(error))
        if error.errno in (errno.EPERM, errno.EACCES) and isinstance(self.effective, int):
            missing = missing_capabilities(self.effective, needs)
            if missing:
                return Support.unknown(
                    "missing_capability", f"{error}; missing: {', '.join(map(str, missing))}"
                )
        if error.errno in _PASSING:
            return Support.unknown("probe_failed", str(error))
        return Support.no(f"{step}_refused", str(error))


def _errno_name(code: int | None) -> str:
    return errno.errorcode.get(code or 0, f"errno {code}")
