# SPDX-License-Identifier: Apache-2.0
"""What one write of a service or back end map did. Pure."""

from dataclasses import dataclass
from typing import NamedTuple

from kptrace.model.netfilter import IpFamily

#: IP address in text form and port number.
EndpointAddress = tuple[str, int]


class Frontend(NamedTuple):
    """Where a service is reached. `protocol` 0: with any protocol."""

    ip: str
    port: int
    protocol: int


@dataclass(frozen=True, slots=True)
class FrontendChange:
    """What one write did to one frontend.

    Attributes:
        frontend: whose entries it concerns.
        flags: `ServiceFlag` of its master entry; of the last one if that is gone.
        appeared, vanished: whether the frontend came or went as such, with or without endpoints.
        present: whether it is there after the write.
        added, removed: endpoints that became reachable there, and that are not any more.
        endpoints: all that became reachable there and were not taken away.
    """

    frontend: Frontend
    flags: int
    appeared: bool
    vanished: bool
    present: bool
    added: frozenset[EndpointAddress]
    removed: frozenset[EndpointAddress]
    endpoints: frozenset[EndpointAddress]


@dataclass(frozen=True, slots=True)
class Effect:
    """What one write did; false if nothing: then it is no commit."""

    family: IpFamily
    changes: tuple[FrontendChange, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.changes)
