# SPDX-License-Identifier: Apache-2.0
"""How many entries a legacy table has, asked of the kernel without reading the table."""

import ctypes
import socket
import struct
from typing import Final

from kptrace.model.netfilter import IpFamily

_SO_GET_INFO: Final = 64
#: `struct ipt_getinfo` and `struct ip6t_getinfo`: name, valid_hooks, hook_entry, underflow, num_entries, size.
_INFO: Final = struct.Struct("=32sI5I5I2I")
_PLACES: Final = {
    IpFamily.IPV4: (socket.AF_INET, socket.IPPROTO_IP),
    IpFamily.IPV6: (socket.AF_INET6, socket.IPPROTO_IPV6),
}


def table_entries(family: IpFamily, table: str) -> int | None:
    """Entries (rules, policies and chain ends) of a table that is there, in the calling thread's network namespace.

    Asking for a table that is not there would make it: ask only for names from `table_names`. None if it is gone or the
    kernel refuses.
    """
    address, level = _PLACES[family]
    # The kernel reads the name from the buffer that it answers into, which Python's getsockopt() cannot do.
    buffer = ctypes.create_string_buffer(_INFO.pack(table.encode(), *(0,) * 13), _INFO.size)
    size = ctypes.c_uint(_INFO.size)
    try:
        with socket.socket(address, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.IPPROTO_RAW) as channel:
            refused = ctypes.CDLL(None).getsockopt(
                channel.fileno(), level, _SO_GET_INFO, buffer, ctypes.byref(size)
            )
    except OSError:
        return None
    return None if refused else int(_INFO.unpack(buffer.raw)[-2])
