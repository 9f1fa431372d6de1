# SPDX-License-Identifier: Apache-2.0
"""Where the host's file systems are: everything that reads them gets this instead of a path of its own."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Host:
    """The roots of the host's file systems, as this process sees them.

    Attributes:
        proc: procfs of the host's PID namespace.
        sys: sysfs.
        bpffs: the BPF file system that others pin their objects in.
    """

    proc: Path = Path("/proc")
    sys: Path = Path("/sys")
    bpffs: Path = Path("/sys/fs/bpf")

    @property
    def vmlinux_btf(self) -> Path:
        """BTF of the running kernel."""
        return self.sys / "kernel/btf/vmlinux"

    def module_btf(self, module: str) -> Path:
        """BTF of a loaded module, which continues the kernel's; there is none for what is built in."""
        return self.sys / "kernel/btf" / module

    @property
    def lockdown(self) -> Path:
        """The kernel's lockdown mode; only there where securityfs is mounted."""
        return self.sys / "kernel/security/lockdown"

    @property
    def kconfig(self) -> Path:
        """The kernel's configuration, compressed; only there with CONFIG_IKCONFIG_PROC."""
        return self.proc / "config.gz"

    def possible_cpus(self) -> int:
        """How many CPUs the kernel may ever have: as many values has an entry of a per-CPU map."""
        ranges = (self.sys / "devices/system/cpu/possible").read_text(encoding="ascii").strip().split(",")
        ends = [each.split("-") for each in ranges]
        return sum(int(end[-1]) - int(end[0]) + 1 for end in ends)
