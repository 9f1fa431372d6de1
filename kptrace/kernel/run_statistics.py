# SPDX-License-Identifier: Apache-2.0
"""Having the kernel count and time the runs of all BPF programs, as long as somebody wants that."""

import errno
import os
import struct
from typing import Self

from kptrace.kernel.syscall import Command, bpf
from kptrace.model.errors import KernelError, PrivilegeError, UnsupportedError

RUN_TIME = 0  # BPF_STATSRUN_TIME


class RunStatistics:
    """A hold on the kernel's run statistics: while anybody has one, every program's `ProgramInfo` counts on.

    Every run of every BPF program of the machine then costs two readings of the clock more. The hold goes away with this
    process, however that ends.

    Linux kernel commit d46edd671a14 ("bpf: Sharing bpf runtime stats with BPF_ENABLE_STATS") (in v5.8).
    """

    def __init__(self) -> None:
        """Switch them on.

        Raises:
            PrivilegeError: CAP_SYS_ADMIN is missing.
            UnsupportedError: the kernel has no such switch.
            KernelError: anything else that the kernel refused.
        """
        try:
            self._fd = bpf(Command.ENABLE_STATS, struct.pack("=I", RUN_TIME))
        except KernelError as error:
            if error.errno == errno.EPERM:
                raise PrivilegeError(
                    f"the kernel refused to count runs of BPF programs: {error}",
                    remedy="run as root, or grant CAP_SYS_ADMIN",
                ) from error
            if error.errno == errno.EINVAL:
                raise UnsupportedError(
                    f"the kernel cannot be asked to count runs of BPF programs: {error}",
                    remedy="use Linux 5.8 or newer, or set kernel.bpf_stats_enabled",
                ) from error
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give up the hold. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
