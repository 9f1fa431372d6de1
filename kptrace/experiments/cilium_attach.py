# SPDX-License-Identifier: Apache-2.0
"""Holding datapath programs at their hooks as Cilium's agent does: by pinned links, or by tc filters on older kernels."""

import errno
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from kptrace.kernel.attach_datapath import attach_tcx, update_link
from kptrace.kernel.objects import set_pin
from kptrace.model.errors import KernelError

_CLSACT_INGRESS, _CLSACT_EGRESS = 0xFFFFFFF2, 0xFFFFFFF3  # TC_H_CLSACT and the hook
_PRIORITY, _HANDLE = 1, 1
_ETH_P_ALL = 3


class Attachment(Protocol):
    """A hook that has one program."""

    def replace(self, program: int) -> None:
        """Put another program there, with no packet passing by in between."""

    def close(self) -> None:
        """Leave the hook without a program. Idempotent."""


class PinnedLink:
    """A link that stays, with its program, when its maker is gone."""

    def __init__(self, link: int, pin: Path) -> None:
        """Take over the link and pin it."""
        self._link = link
        self._pin = pin
        try:
            pin.parent.mkdir(parents=True, exist_ok=True)
            set_pin(link, pin)
        except BaseException:
            os.close(link)
            raise

    def replace(self, program: int) -> None:
        """Put another program into the link."""
        update_link(self._link, program)

    def close(self) -> None:
        """Remove the pin and the link. Idempotent."""
        if self._link >= 0:
            self._pin.unlink(missing_ok=True)
            os.close(self._link)
            self._link = -1


class TcFilter:
    """A filter of the `clsact` queueing discipline, which stays as long as its device."""

    def __init__(self, program: int, name: str, device: str, *, ingress: bool) -> None:
        """Install it in the calling thread's network namespace."""
        self._name = f"{name}-{device}"
        self._ifindex = socket.if_nametoindex(device)
        self._parent = _CLSACT_INGRESS if ingress else _CLSACT_EGRESS
        self._open = True
        with IPRoute() as netlink:
            try:
                netlink.tc("add", "clsact", self._ifindex)
            except NetlinkError as error:
                if error.code != errno.EEXIST:
                    raise
        self.replace(program)

    def replace(self, program: int) -> None:
        """Put another program into the filter, from the same namespace."""
        with IPRoute() as netlink:
            netlink.tc(
                "replace-filter",
                "bpf",
                self._ifindex,
                _HANDLE,
                parent=self._parent,
                prio=_PRIORITY,
                protocol=_ETH_P_ALL,
                fd=program,
                name=self._name,
                direct_action=True,
            )

    def close(self) -> None:
        """Remove the filter, from the same namespace. Idempotent."""
        if self._open:
            with IPRoute() as netlink:
                netlink.tc(
                    "del-filter",
                    "bpf",
                    self._ifindex,
                    _HANDLE,
                    parent=self._parent,
                    prio=_PRIORITY,
                    protocol=_ETH_P_ALL,
                )
            self._open = False


@dataclass(frozen=True, slots=True)
class TcHook:
    """Where packets of a device meet a program.

    Attributes:
        device: in the calling thread's network namespace.
        ingress: as they come in, or as they go out.
        pin: for the link.
        links: by tcx (since v6.6), by clsact filters, or by what the kernel has (None).
    """

    device: str
    ingress: bool
    pin: Path
    links: bool | None = None

    def attach(self, program: int, name: str) -> Attachment:
        """Attach the program of this name."""
        if self.links is not False:
            try:
                link = attach_tcx(program, socket.if_nametoindex(self.device), self.ingress)
            except KernelError as error:
                if self.links or error.errno != errno.EINVAL:
                    raise
            else:
                return PinnedLink(link, self.pin)
        return TcFilter(program, name, self.device, ingress=self.ingress)


@dataclass(frozen=True, slots=True)
class LinkHook:
    """Where a link is made by the given function, from a program's descriptor.

    Attributes:
        make: returns the link.
        pin: for it.
    """

    make: Callable[[int], int]
    pin: Path

    def attach(self, program: int, _name: str) -> Attachment:
        """Attach the program."""
        return PinnedLink(self.make(program), self.pin)
