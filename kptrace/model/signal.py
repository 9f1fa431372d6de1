# SPDX-License-Identifier: Apache-2.0
"""What a signal is to the daemon and the exporter: a name, mechanism states, and metric families."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from kptrace.model.metrics import MetricFamily, MetricSpec


class State(StrEnum):
    """How far a mechanism measures its signal now."""

    ACTIVE = "active"
    DEGRADED = "degraded"
    UNAVAILABLE = "unavailable"
    OFF = "off"


@dataclass(frozen=True, slots=True)
class MechanismState:
    """One row of /status and of `kptrace_signal_state`.

    Attributes:
        signal: `lookup`, `rewrite`, ...
        mechanism: `bracket`, `tracepoint`, ...
        state: active, degraded, unavailable or off.
        reason: a short stable code (`ok`, `eperm`, `nfqueue_present`, ...), bounded in number: it is a label value.
        detail: what the probe saw (syscall, errno, file, symbol), for people; may hold anything but names of
            services and pods.
    """

    signal: str
    mechanism: str
    state: State
    reason: str = "ok"
    detail: str = ""


class Source(Protocol):
    """Anything that has metrics: a signal, the identity store, the daemon itself.

    `families` is called on an HTTP thread for every scrape: it reads maps and published snapshots only, blocks on
    nothing, and changes nothing. It may raise: the exporter isolates sources and reports the failure.
    """

    @property
    def name(self) -> str:
        """Stable snake_case name, a label value of the collector metrics."""
        ...

    def describe(self) -> Sequence[MetricSpec]:
        """All families that it can ever yield."""
        ...

    def families(self) -> Iterable[MetricFamily]:
        """The present values."""
        ...

    def states(self) -> Sequence[MechanismState]:
        """State of every mechanism of the signal; empty for sources that measure nothing themselves."""
        ...
