# SPDX-License-Identifier: Apache-2.0
"""What a signal needs of the daemon's loop, in whose thread all but its `families` runs."""

from collections.abc import Callable
from typing import Protocol


class EventLoop(Protocol):
    """The part of the daemon's loop that signals use."""

    def add_reader(self, fd: int, callback: Callable[[], None]) -> None:
        """Call when readable."""
        ...

    def remove_reader(self, fd: int) -> None:
        """Stop that."""
        ...

    def call_later(self, seconds: float, callback: Callable[[], None]) -> object:
        """Call once."""
        ...

    def call_every(self, seconds: float, callback: Callable[[], None]) -> object:
        """Call again and again."""
        ...
