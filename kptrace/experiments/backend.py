# SPDX-License-Identifier: Apache-2.0
"""The back ends of an embedded node: one process that answers on every address of its namespace.

`python -m kptrace.experiments.backend PORT SINK_PORT`. TCP: greets with the address that the client reached, then
echoes. UDP: echoes from that address. The sink port takes UDP datagrams and never answers. It says `ready` when it
listens and ends when its standard input does, so it never outlives who started it.
"""

import contextlib
import selectors
import socket
import struct
import sys
from collections.abc import Callable

_BACKLOG = 4096
_DATAGRAM = 65536
_IP_PKTINFO = 8
_IN_PKTINFO = struct.Struct("=I4s4s")
_IN6_PKTINFO = struct.Struct("=16sI")


def _answer_datagrams(server: socket.socket, control: tuple[int, int]) -> None:
    """Echo what has arrived, each datagram from the address that it was sent to."""
    with contextlib.suppress(BlockingIOError):
        while True:
            data, ancillary, _, client = server.recvmsg(_DATAGRAM, 128)
            own = []
            for level, kind, value in ancillary:
                if (level, kind) == control:
                    # The index is left out: the answer goes where the route leads.
                    if level == socket.IPPROTO_IP:
                        own = [(level, kind, _IN_PKTINFO.pack(0, _IN_PKTINFO.unpack(value)[1], bytes(4)))]
                    else:
                        own = [(level, kind, _IN6_PKTINFO.pack(_IN6_PKTINFO.unpack(value)[0], 0))]
            # A client that is gone, or whose way back is, is no reason to stop serving the others.
            with contextlib.suppress(OSError):
                server.sendmsg([data], own, 0, client)


class Backend:
    """All sockets of the process on one selector."""

    def __init__(self, port: int, sink_port: int) -> None:
        self._selector = selectors.DefaultSelector()
        self._sinks: list[socket.socket] = []
        for family, anywhere in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):  # noqa: S104
            self._listen(family, anywhere, port)
            # Never read, only kept open, so that nobody answers with an ICMP error.
            self._sinks.append(self._bind(family, socket.SOCK_DGRAM, (anywhere, sink_port)))

    @staticmethod
    def _bind(family: int, kind: int, address: tuple[str, int]) -> socket.socket:
        server = socket.socket(family, kind)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        server.bind(address)
        server.setblocking(False)
        return server

    def _listen(self, family: int, anywhere: str, port: int) -> None:
        stream = self._bind(family, socket.SOCK_STREAM, (anywhere, port))
        stream.listen(_BACKLOG)
        self._selector.register(stream, selectors.EVENT_READ, lambda: self._accept(stream))
        datagram = self._bind(family, socket.SOCK_DGRAM, (anywhere, port))
        control = (socket.IPPROTO_IP, _IP_PKTINFO)
        if family == socket.AF_INET6:
            control = (socket.IPPROTO_IPV6, socket.IPV6_PKTINFO)
            datagram.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
        else:
            datagram.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
        self._selector.register(datagram, selectors.EVENT_READ, lambda: _answer_datagrams(datagram, control))

    def _accept(self, server: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                connection, _ = server.accept()
                connection.setblocking(False)
                ip, port = connection.getsockname()[:2]
                try:
                    connection.send(f"{ip} {port}\n".encode())
                except OSError:
                    connection.close()
                    continue
                self._selector.register(connection, selectors.EVENT_READ, self._echo(connection))

    def _echo(self, connection: socket.socket) -> Callable[[], None]:
        def ready() -> None:
            try:
                data = connection.recv(_DATAGRAM)
                if data:
                    connection.send(data)
                    return
            except OSError:
                data = b""
            self._selector.unregister(connection)
            connection.close()

        return ready

    def run(self) -> None:
        """Serve until standard input ends."""
        ended: list[bool] = []
        self._selector.register(sys.stdin, selectors.EVENT_READ, lambda: ended.append(True))
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        while not ended:
            for key, _ in self._selector.select():
                key.data()


if __name__ == "__main__":
    Backend(int(sys.argv[1]), int(sys.argv[2])).run()
