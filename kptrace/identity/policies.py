# SPDX-License-Identifier: Apache-2.0
"""Where traffic may go: a Service's traffic policies and an endpoint's hints, decoded like all other fields."""

import sys
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from kptrace.identity.fields import member, members, text_of
from kptrace.identity.records import LocalPolicy
from kptrace.model.identity import NO_HINTS, Hints


def local_policy(spec: Mapping[str, Any]) -> LocalPolicy:
    """Which traffic policies of a Service's specification are Local, of those that are in force."""
    found = LocalPolicy.NONE
    if text_of(spec, "internalTrafficPolicy", "spec") == "Local":
        found |= LocalPolicy.INTERNAL
    # The policy is left over where a Service is no longer reached from outside.
    outside = text_of(spec, "type", "spec") in ("LoadBalancer", "NodePort") or members(
        spec, "externalIPs", str, "spec"
    )
    if outside and text_of(spec, "externalTrafficPolicy", "spec") == "Local":
        found |= LocalPolicy.EXTERNAL
    return found


def hints_of(raw: Mapping[str, Any], path: str) -> Hints:
    """The hints of an EndpointSlice's endpoint."""
    hints: dict[str, Any] | None = member(raw, "hints", dict, path)
    if not hints:
        return NO_HINTS
    zones, nodes = (
        tuple(
            sorted(
                {
                    sys.intern(text_of(each, "name", path))
                    for each in members(hints, key, dict, f"{path}.hints")
                }
            )
        )
        for key in ("forZones", "forNodes")
    )
    return _shared(Hints(zones, nodes))


@lru_cache(maxsize=1024)
def _shared(hints: Hints) -> Hints:
    """The same object for the same hints: there are many endpoints and few zones."""
    return hints
