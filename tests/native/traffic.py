# SPDX-License-Identifier: Apache-2.0
"""Packets in exact numbers, sent from the calling thread's network namespace."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager

LOOPBACK = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}


@contextmanager
def udp_sink(family: int, port: int) -> Iterator[None]:
    """A bound UDP socket that never answers, so that no ICMP error follows."""
    with socket.socket(family, socket.SOCK_DGRAM) as sink:
        sink.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        sink.bind((LOOPBACK[family], port))
        yield


def udp_one_flow(family: int, port: int, count: int) -> None:
    """Datagrams of one flow, that is of one connection-tracking entry."""
    with socket.socket(family, socket.SOCK_DGRAM) as sender:
        for _ in range(count):
            _send(sender, family, port)


def udp_flows(family: int, port: int, count: int) -> None:
    """One datagram from each of `count` source ports."""
    for source in range(count):
        with socket.socket(family, socket.SOCK_DGRAM) as sender:
            sender.bind((LOOPBACK[family], 20000 + source))
            _send(sender, family, port)


def tcp_connects(family: int, port: int, count: int) -> None:
    """Connections to a listener of our own, each from a new source port, opened and reset."""
    with socket.create_server((LOOPBACK[family], port), family=family, backlog=1024) as server:
        for _ in range(count):
            with socket.create_connection(server.getsockname()[:2]):
                server.accept()[0].close()


def tcp_refused(family: int, port: int, count: int) -> None:
    """Connection attempts whose only packet is one SYN: given up before it is sent again."""
    for _ in range(count):
        with socket.socket(family, socket.SOCK_STREAM) as client:
            client.setblocking(False)
            if client.connect_ex((LOOPBACK[family], port)) == 0:
                raise AssertionError("the connection was not to be accepted")


def _send(sender: socket.socket, family: int, port: int) -> None:
    try:
        sender.sendto(b"k", (LOOPBACK[family], port))
    except (PermissionError, ConnectionRefusedError):
        return  # what a drop or a reject in OUTPUT tells the sender; the packet was counted
