# SPDX-License-Identifier: Apache-2.0
"""Where traffic may go: a Service's traffic policies and an endpoint's hints."""

import sys
from collections.abc import Sequence

from kptrace.identity.records import LocalPolicy
from kptrace.identity.wire import EndpointHints, Hint, ServiceSpec


def local_policy(spec: ServiceSpec) -> LocalPolicy:
    """Which traffic policies of a Service's specification are Local, of those that are in force."""
    found = LocalPolicy.NONE
    if spec.internal_traffic_policy == "Local":
        found |= LocalPolicy.INTERNAL
    # The policy is left over where a Service is no longer reached from outside.
    outside = spec.type in ("LoadBalancer", "NodePort") or spec.external_ips
    if outside and spec.external_traffic_policy == "Local":
        found |= LocalPolicy.EXTERNAL
    return found


def hints_of(hints: EndpointHints) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The zones and the nodes that an endpoint is meant for, each sorted."""
    return _names(hints.for_zones), _names(hints.for_nodes)


def _names(hints: Sequence[Hint] | None) -> tuple[str, ...]:
    return tuple(sorted({sys.intern(hint.name or "") for hint in hints or ()}))
