# SPDX-License-Identifier: Apache-2.0
"""What goes wrong around a test machine: one line that says what happened, and what helps."""


class VmError(Exception):
    """An error for the person at the terminal.

    Attributes:
        code: the exit code.
    """

    def __init__(self, message: str, *, remedy: str = "", usage: bool = False) -> None:
        super().__init__(f"{message}; {remedy}" if remedy else message)
        self.code = 2 if usage else 1
