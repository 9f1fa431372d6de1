# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C and SIGTERM that leave nothing behind: both raise KeyboardInterrupt, and wait while a cleanup runs."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def _in_main_thread() -> bool:
    """Whether the caller may set signal handlers; in other threads signals do no harm."""
    return threading.current_thread() is threading.main_thread()


@contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGTERM end the body as Ctrl-C does: by KeyboardInterrupt, so that it cleans up."""
    if not _in_main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def unhurried() -> Iterator[None]:
    """Hold SIGINT and SIGTERM back while the body cleans up: a second Ctrl-C would leave half of it.

    By handlers, not by a signal mask: another thread could still take the signal, and Python would raise here.
    """
    if not _in_main_thread():
        yield
        return
    held: list[int] = []

    def hold(number: int, _frame: FrameType | None) -> None:
        held.append(number)

    before = {number: signal.signal(number, hold) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if held:
            signal.raise_signal(held[0])
