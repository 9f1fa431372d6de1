# SPDX-License-Identifier: Apache-2.0
"""The mechanisms that are not in use on a node, and why: rows of /status without samples."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from kptrace.daemon.part import Part
from kptrace.model.metrics import MetricFamily, MetricSpec
from kptrace.model.signal import MechanismState, State

#: Reasons of mechanisms that might be used: nobody has tried them yet, or another one does the same.
STARTING: Final = "starting"
NOT_NEEDED: Final = "not_needed"
_IDLE: Final = frozenset({STARTING, NOT_NEEDED})


class Unused:
    """Mechanisms that are not in use on this node: they have states and no samples.

    Attributes:
        rows: the states by (signal, mechanism); replaced as a whole.
    """

    name = "mechanisms"

    def __init__(self) -> None:
        """None yet."""
        self.rows: Mapping[tuple[str, str], MechanismState] = {}

    def add(self, states: Iterable[MechanismState]) -> None:
        """Publish these rows, each in place of what was said of the mechanism before."""
        self.rows = {**self.rows, **{(state.signal, state.mechanism): state for state in states}}

    def off(self, part: Part, reason: str, detail: str) -> None:
        """This one is not tried, or not yet."""
        self.add([MechanismState(part.signal, part.mechanism, State.OFF, reason, detail)])

    def learn(self, fresh: Iterable[MechanismState]) -> None:
        """Take what a probe of all features says of the mechanisms; what was found while starting says more."""
        rows = self.rows
        self.add(
            row
            for row in fresh
            if (known := rows.get((row.signal, row.mechanism))) is not None
            and (known.state is State.ACTIVE or (known.reason in _IDLE and row.state is State.UNAVAILABLE))
        )

    def settle(self, parts: Iterable[Part], running: Mapping[str, str]) -> None:
        """What nobody tried is off, where another mechanism of its group runs.

        Args:
            parts: all of them.
            running: the mechanism by group.
        """
        for part in parts:
            known, used = self.rows.get((part.signal, part.mechanism)), running.get(part.group)
            if used and known and (known.state is State.ACTIVE or known.reason == STARTING):
                self.off(part, NOT_NEEDED, f"{used} is in use")

    def remove(self, part: Part) -> None:
        """It runs: its own signal tells its state from now on."""
        key = part.signal, part.mechanism
        self.rows = {each: row for each, row in self.rows.items() if each != key}

    def describe(self) -> Sequence[MetricSpec]:
        """See `Source`."""
        return ()

    def families(self) -> Iterable[MetricFamily]:
        """See `Source`."""
        return ()

    def states(self) -> Sequence[MechanismState]:
        """See `Source`."""
        return list(self.rows.values())
