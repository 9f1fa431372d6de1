# SPDX-License-Identifier: Apache-2.0
from kptrace.identity.feed import Alive, Listed, Rejected, Trouble
from kptrace.identity.health import Health
from kptrace.identity.records import Kind
from kptrace.model.signal import MechanismState, State

SCOPE = "watch_services"
LISTED = Listed(SCOPE, 10.0, Kind.SERVICES, ())


def shown(health: Health, now: float) -> tuple[State, str, str]:
    """State, reason and detail."""
    row: MechanismState = health.state(now)
    assert (row.signal, row.mechanism) == ("identity", SCOPE)
    return row.state, row.reason, row.detail


def test_a_source_that_was_never_heard_is_unavailable() -> None:
    """First it is starting; a failure before the first list leaves no names at all."""
    fresh = Health(SCOPE)
    assert shown(fresh, 1.0) == (State.DEGRADED, "starting", "no names yet")
    refused = fresh.after(Trouble(SCOPE, 1.0, "forbidden", "403"))
    assert shown(refused, 1.0) == (State.UNAVAILABLE, "forbidden", "no names yet: 403")
    assert shown(refused.after(LISTED), 10.0) == (State.ACTIVE, "ok", "")


def test_a_source_that_falls_silent_says_how_old_its_names_are() -> None:
    """The age is counted from the last thing that was heard, and ends with the next."""
    health = (
        Health(SCOPE)
        .after(LISTED)
        .after(Alive(SCOPE, 40.0))
        .after(Trouble(SCOPE, 50.0, "unreachable", "refused"))
    )
    assert shown(health, 100.0) == (State.DEGRADED, "unreachable", "names are 60 s old: refused")
    assert shown(health.after(Alive(SCOPE, 120.0)), 130.0) == (State.ACTIVE, "ok", "")


def test_what_heals_itself_is_no_degradation() -> None:
    """An expired version leads to a list, and one bad object does not spoil the others."""
    health = Health(SCOPE).after(LISTED)
    assert health.after(Trouble(SCOPE, 20.0, "expired", "410")) == health
    assert health.after(Rejected(SCOPE, 20.0, "spec")) == health
