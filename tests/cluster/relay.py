# SPDX-License-Identifier: Apache-2.0
"""A program that carries connections from one network namespace to another: relay.py LISTENING-FD PORT.

The listening socket belongs to the namespace that made it. Each connection that it takes is joined to one to the same
port of the loopback address in the namespace of this process. So an API server that listens on the loopback address
only is where a kubeconfig says, in both. Ends with its parent.
"""

import socket
import sys
import threading

_BYTES = 1 << 17


def carry(source: socket.socket, sink: socket.socket) -> None:
    """Everything that comes from one to the other, and its end too."""
    try:
        while data := source.recv(_BYTES):
            sink.sendall(data)
    except OSError:
        pass  # one of the two is gone; the other is told below
    for end in (source, sink):
        try:
            end.shutdown(socket.SHUT_RDWR)
        except OSError:
            continue


def join(near: socket.socket, port: int) -> None:
    """One connection, until either side ends it."""
    with near:
        try:
            far = socket.create_connection(("127.0.0.1", port))
        except OSError:
            return
        with far:
            for end in (near, far):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            back = threading.Thread(target=carry, args=(far, near), daemon=True)
            back.start()
            carry(near, far)
            back.join()


def main() -> None:
    """Take connections for ever."""
    listener, port = socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])
    while True:
        near, _address = listener.accept()
        threading.Thread(target=join, args=(near, port), daemon=True).start()


if __name__ == "__main__":
    main()
