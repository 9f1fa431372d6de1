# SPDX-License-Identifier: Apache-2.0
"""What a commit's own bytes tell of Service ports, the same for every data plane. Pure.

Each answer is yes, no, or None where the bytes do not tell: a copy that was cut, a table that names nothing.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Final, Literal, Protocol

from kptrace.model.identity import ServicePort


class Everything(Enum):
    """The one value beside sets of Service ports: the bytes rule nothing out."""

    EVERYTHING = "everything"


EVERYTHING: Final = Everything.EVERYTHING
Touched = frozenset[ServicePort] | Literal[Everything.EVERYTHING]


class Told(Protocol):
    """What one commit tells. It answers from names and keys, so also of a Service port that nobody knew of then."""

    def touches(self, port: ServicePort, *, bare: bool) -> bool | None:
        """Whether it wrote anything of a Service port; `bare`: one that has no endpoint for this node."""
        ...

    def endpoint(self, port: ServicePort, ip: str, number: int) -> bool | None:
        """Whether an endpoint is in the Service port's rules now."""
        ...

    def mentions(self, port: ServicePort, ip: str, number: int) -> bool:
        """Whether something of an endpoint's own is written, be it only to empty and then delete it."""
        ...

    def present(self, port: ServicePort) -> bool | None:
        """Whether the Service port is there now, with or without endpoints."""
        ...

    def address(self, port: ServicePort, ip: str, number: int) -> bool | None:
        """Whether an address of the Service port is answered for now; without an IP it is a node port."""
        ...


@dataclass(frozen=True, slots=True)
class Names:
    """A commit of which no more is known than which Service ports it touched."""

    touched: Touched

    def touches(self, port: ServicePort, *, bare: bool) -> bool | None:
        """See `Told`."""
        return None if self.touched is EVERYTHING else port in self.touched

    def endpoint(self, port: ServicePort, ip: str, number: int) -> bool | None:
        """Not told."""
        return None

    def mentions(self, port: ServicePort, ip: str, number: int) -> bool:
        """Not told."""
        return False

    def present(self, port: ServicePort) -> bool | None:
        """Not told."""
        return None

    def address(self, port: ServicePort, ip: str, number: int) -> bool | None:
        """Not told."""
        return None


#: A legacy table's replacement, or a batch whose bytes could not be read.
NOTHING_TOLD: Final = Names(EVERYTHING)


def port_names(port: ServicePort) -> tuple[str, ...]:
    """What kube-proxy may call a Service port's port.

    A port without a name has its number here and nothing there, and a name may be a number too: only one of a
    Service's ports can be without a name, so both are tried.
    """
    return (port.port, "") if port.port.isdigit() else (port.port,)
