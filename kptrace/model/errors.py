# SPDX-License-Identifier: Apache-2.0
"""The errors that a user can meet, each with its remedy and its exit code.

KptraceError
├── UsageError            2  a flag, variable or configuration value is wrong
├── PrivilegeError        3  not root, or a capability is missing
├── UnsupportedError      4  this kernel cannot do what was asked
├── ManifestError         5  a Kubernetes manifest cannot be read or understood
├── ListenError           6  the metrics address cannot be bound, or its TLS files are bad
├── CompileError          7  BCC is missing or refused the program
└── KernelError           8  the kernel refused a call that should have worked

Only `kptrace.cli` prints errors and exits; everything below raises. 0 is success, 1 an unexpected failure (a bug),
130 an interrupt.
"""

from typing import ClassVar


class KptraceError(Exception):
    """Something that the user can act on.

    Attributes:
        remedy: what to do about it, one sentence without a final stop.
        exit_code: what the process ends with when the error reaches the command line.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.remedy = remedy

    def one_line(self) -> str:
        """The message and its remedy as the one line that the command line prints."""
        text = " ".join(str(self).split())
        return f"{text}; {' '.join(self.remedy.split())}" if self.remedy else text


class UsageError(KptraceError):
    """A flag, environment variable or configuration value is wrong."""

    exit_code = 2


class PrivilegeError(KptraceError):
    """The process lacks a capability; the message names it."""

    exit_code = 3


class UnsupportedError(KptraceError):
    """This kernel cannot do what was asked; the message says what the probe saw."""

    exit_code = 4


class ManifestError(KptraceError):
    """A Kubernetes manifest cannot be read; the message has file, line and what was expected."""

    exit_code = 5


class ListenError(KptraceError):
    """The metrics address cannot be bound, or its certificates cannot be used."""

    exit_code = 6


class CompileError(KptraceError):
    """BCC is missing, or refused the program; the message has its first diagnostic."""

    exit_code = 7


class KernelError(KptraceError):
    """The kernel refused a call; `errno` is what it answered."""

    exit_code = 8

    def __init__(self, message: str, *, errno: int = 0, remedy: str = "") -> None:
        super().__init__(message, remedy=remedy)
        self.errno = errno
