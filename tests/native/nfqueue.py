# SPDX-License-Identifier: Apache-2.0
"""A program that holds packets in an NFQUEUE and lets them go: raw nfnetlink, in the calling thread's namespace."""

import select
import socket
import struct
import time
from types import TracebackType
from typing import Self

_NETLINK_NETFILTER = 12
_SUBSYS = 3
_PACKET, _VERDICT, _CONFIG = 0, 1, 2
_ATTR_CMD, _ATTR_PARAMS = 1, 2
_COPY_PACKET = 2
NF_ACCEPT = 1


class HeldQueue:
    """One queue number; `take` holds packets, `accept` lets them go."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._sequence = 0
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER)
        self._socket.bind((0, 0))
        self._configure(_attribute(_ATTR_CMD, struct.pack(">BxH", 1, socket.AF_INET)))
        self._configure(_attribute(_ATTR_PARAMS, struct.pack(">IB", 0xFFFF, _COPY_PACKET)))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def take(self, count: int, seconds: float = 5.0) -> list[int]:
        """Packet ids of at least `count` held packets, or of as many as came in time."""
        ids: list[int] = []
        deadline = time.monotonic() + seconds
        while (
            len(ids) < count
            and select.select([self._socket], [], [], max(0.0, deadline - time.monotonic()))[0]
        ):
            ids += _packet_ids(self._socket.recv(1 << 20))
        return ids

    def accept(self, ids: list[int]) -> None:
        """Let packets go on."""
        for packet in ids:
            self._send(_VERDICT, _attribute(2, struct.pack(">II", NF_ACCEPT, packet)), flags=1)

    def _configure(self, attributes: bytes) -> None:
        self._send(_CONFIG, attributes, flags=5)
        error = struct.unpack_from("<i", self._socket.recv(65536), 16)[0]
        if error:
            raise OSError(-error, "nfqueue configuration")

    def _send(self, kind: int, attributes: bytes, *, flags: int) -> None:
        self._sequence += 1
        body = struct.pack(">BBH", 0, 0, self._number) + attributes
        self._socket.send(
            struct.pack("<IHHII", 16 + len(body), _SUBSYS << 8 | kind, flags, self._sequence, 0) + body
        )


def _attribute(kind: int, data: bytes) -> bytes:
    return struct.pack("<HH", 4 + len(data), kind) + data + bytes(-len(data) % 4)


def _packet_ids(datagram: bytes) -> list[int]:
    ids = []
    offset = 0
    while offset + 16 <= len(datagram):
        length, kind = struct.unpack_from("<IH", datagram, offset)
        if kind == _SUBSYS << 8 | _PACKET:
            at = offset + 20
            while at < offset + length:
                size, attribute = struct.unpack_from("<HH", datagram, at)
                if attribute == 1:  # NFQA_PACKET_HDR
                    ids.append(struct.unpack_from(">I", datagram, at + 4)[0])
                at += (size + 3) & ~3
        offset += (length + 3) & ~3
    return ids
