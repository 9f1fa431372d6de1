# SPDX-License-Identifier: Apache-2.0
"""Commits that nobody traced: the ruleset's generation moved further than the traced ones explain."""

from collections.abc import Callable

import structlog

from kptrace.dataplanes.nftables.netlink import NetlinkError
from kptrace.dataplanes.nftables.netlink_socket import NfnetlinkSocket
from kptrace.kernel.netns import NetworkNamespace
from kptrace.model.rewrite import Outcome

_WRAP = 0xFFFFFFFF
_BACKWARDS = 1 << 31


class RulesetSocket:
    """Asks for the generation in one network namespace, for as long as there is nf_tables."""

    def __init__(self, netns: NetworkNamespace, log: structlog.stdlib.BoundLogger) -> None:
        """Open a socket there; without one the generation stays unknown."""
        self._log = log
        self._socket: NfnetlinkSocket | None = None
        try:
            with netns.enter():
                self._socket = NfnetlinkSocket.open()
        except NetlinkError as error:
            log.warning("no_nfnetlink", error=str(error))

    def generation(self) -> int | None:
        """The ruleset's generation; None where the kernel does not tell."""
        try:
            return self._socket.generation() if self._socket else None
        except NetlinkError as error:
            self._log.debug("no_generation", error=str(error))
            return None

    def close(self) -> None:
        """Close the socket. Idempotent."""
        if self._socket is not None:
            self._socket.close()


class GenerationWatch:
    """Compares the generation with what was traced, at quiet moments only.

    Attributes:
        generation: when last asked; None before the first time, or without nf_tables.
        untraced: commits that were missed, ever.
    """

    def __init__(
        self, ask: Callable[[], int | None], catch_up: Callable[[], None], busy: Callable[[], bool]
    ) -> None:
        """Watch.

        Args:
            ask: GETGEN; None where it failed.
            catch_up: takes all records in that wait.
            busy: whether a transaction is under way, which may or may not have been counted by the generation yet.
        """
        self._ask = ask
        self._catch_up = catch_up
        self._busy = busy
        self._anchor: int | None = None
        self._explained = 0
        self.generation: int | None = None
        self.untraced = 0

    def traced(self, outcome: Outcome) -> None:
        """A transaction of the namespace was seen: it explains one commit, or may do so."""
        self._explained += outcome in (Outcome.COMMITTED, Outcome.UNKNOWN)

    def tick(self) -> int:
        """Compare; returns how many commits were found missing.

        A commit between the two questions, or one under way, puts the comparison off: nothing is ever guessed.
        """
        before = self._ask()
        if self._busy():
            self.generation = before
            return 0
        self._catch_up()
        after = self._ask()
        self.generation = after
        if before is None or before != after:
            return 0
        missing = 0
        if self._anchor is not None:
            moved = (before - self._anchor) & _WRAP
            if moved < _BACKWARDS:  # otherwise it began anew: the module was loaded again
                missing = max(0, moved - self._explained)
        self._anchor, self._explained = before, 0
        self.untraced += missing
        return missing
