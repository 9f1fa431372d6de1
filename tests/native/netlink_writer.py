# SPDX-License-Identifier: Apache-2.0
"""A writer that lists, and deletes connections, by netlink itself, and writes by nft: one step for each line of its input.

`list FAMILY CALL`: dumps of chains, sets and rules, sent and received by sendmsg and recvmsg (looking first how long the
answer is, as kube-proxy's library does) or by sendto and recvfrom; prints how many messages came. `write FILE`: `nft -f`.
`run WORDS`: any program. `pause SECONDS`. `clean`: two dumps of the IPv4 connections, then a deletion of each; prints how
many. Every step ends with a line of output.
"""

import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

from tests.native import batches

FAMILIES = {"ipv4": 2, "ipv6": 10}
GETCHAIN, GETRULE, GETSET = 10 << 8 | 4, 10 << 8 | 7, 10 << 8 | 10
CT_GET, CT_DELETE = 1 << 8 | 1, 1 << 8 | 2
DUMP, ACK = 0x300, 4
DONE, ERROR = 3, 2
TUPLE = 1


def by_messages(channel: socket.socket) -> tuple[Callable[[bytes], object], Callable[[], bytes]]:
    """Send and receive by sendmsg and recvmsg."""

    def receive() -> bytes:
        channel.recvmsg(65536, 0, socket.MSG_PEEK)
        return channel.recvmsg(65536)[0]

    return lambda data: channel.sendmsg([data]), receive


def by_addresses(channel: socket.socket) -> tuple[Callable[[bytes], object], Callable[[], bytes]]:
    """Send and receive by sendto and recvfrom."""
    return lambda data: channel.sendto(data, (0, 0)), lambda: channel.recvfrom(65536)[0]


CALLS = {"sendmsg": by_messages, "sendto": by_addresses}


def ask(channel: socket.socket, data: bytes, how: str) -> Iterator[bytes]:
    """Send a request; the messages that answer it, without the last one, which says that it was."""
    send, receive = CALLS[how](channel)
    send(data)
    while True:
        answer, at = receive(), 0
        while at < len(answer):
            length, kind = struct.unpack_from("=IH", answer, at)
            if kind == ERROR:
                assert not struct.unpack_from("=i", answer, at + 16)[0]
            if kind in (DONE, ERROR):
                return
            yield answer[at : at + length]
            at += (length + 3) & ~3


def attribute(message: bytes, wanted: int) -> bytes:
    """An attribute of a message with its header, padded."""
    at = 20
    while at < len(message):
        length, kind = struct.unpack_from("=HH", message, at)
        if kind & 0x3FFF == wanted:
            return message[at : at + ((length + 3) & ~3)]
        at += (length + 3) & ~3
    raise KeyError(wanted)


def lists(family: str, how: str) -> int:
    """One list: three dumps on one socket."""
    with batches.open_socket() as channel:
        return sum(
            len(list(ask(channel, batches.message(kind, 1 | DUMP, FAMILIES[family], 0), how)))
            for kind in (GETCHAIN, GETSET, GETRULE)
        )


def clean() -> int:
    """Delete every connection, each by a socket of its own."""
    for _ in range(2):
        with batches.open_socket() as channel:
            found = list(ask(channel, batches.message(CT_GET, 1 | DUMP, 2, 0), "sendto"))
    for each in found:
        with batches.open_socket() as channel:
            request = batches.message(CT_DELETE, 1 | ACK, 2, 0, attribute(each, TUPLE))
            assert not list(ask(channel, request, "sendto"))
    return len(found)


def main() -> None:
    """Do what comes."""
    for line in sys.stdin:
        step, *words = line.split()
        done: object = ""
        if step == "list":
            done = lists(*words)
        elif step == "write":
            done = subprocess.run(["nft", "-f", *words], check=True).returncode
        elif step == "run":
            done = subprocess.run(words, check=True, stdout=subprocess.DEVNULL).returncode
        elif step == "pause":
            time.sleep(float(words[0]))
        else:
            done = clean()
        print(done, flush=True)


if __name__ == "__main__":
    main()
