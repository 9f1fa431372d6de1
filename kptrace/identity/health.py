# SPDX-License-Identifier: Apache-2.0
"""What the messages of a feed say about its state: pure, one frozen record for each scope."""

from dataclasses import dataclass, replace

from kptrace.identity.feed import Alive, Changed, Listed, Message, Trouble
from kptrace.model.signal import MechanismState, State

SIGNAL = "identity"


@dataclass(frozen=True, slots=True)
class Health:
    """One part of a feed.

    Attributes:
        scope: its name, the mechanism in states.
        listed: whether all its objects were known once.
        heard_at: monotonic seconds of the last good message.
        reason, detail: of the present trouble; empty for none.
    """

    scope: str
    listed: bool = False
    heard_at: float = 0.0
    reason: str = ""
    detail: str = ""

    def after(self, message: Message) -> "Health":
        """The state that a message of this scope leads to."""
        match message:
            case Trouble():
                # That a version expired is nothing that anyone need act on, as long as the next list succeeds.
                if message.reason == "expired" and self.listed:
                    return self
                return replace(self, reason=message.reason, detail=message.detail)
            case Listed():
                return replace(self, listed=True, heard_at=message.at, reason="", detail="")
            case Changed() | Alive():
                return replace(self, heard_at=message.at, reason="", detail="")
            case _:
                return self

    def state(self, now: float) -> MechanismState:
        """Active, degraded (old names), or unavailable (no names yet)."""
        if not self.listed:
            if not self.reason:
                return MechanismState(SIGNAL, self.scope, State.DEGRADED, "starting", "no names yet")
            detail = f"no names yet: {self.detail}"
            return MechanismState(SIGNAL, self.scope, State.UNAVAILABLE, self.reason, detail)
        if self.reason:
            detail = f"names are {max(0.0, now - self.heard_at):.0f} s old: {self.detail}"
            return MechanismState(SIGNAL, self.scope, State.DEGRADED, self.reason, detail)
        return MechanismState(SIGNAL, self.scope, State.ACTIVE)
