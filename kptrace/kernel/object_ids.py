# SPDX-License-Identifier: Apache-2.0
"""BPF objects of any owner by their ids: which there are, a descriptor of one, what the kernel tells of it."""

import ctypes
import errno
import struct
from collections.abc import Iterator
from enum import Enum
from typing import Final

from kptrace.kernel.syscall import Command, bpf, bpf_inout
from kptrace.model.errors import KernelError

# More than any of the kernel's structures so far; it fills what it knows, and says how much.
_BYTES: Final = 512
_GET_INFO: Final = struct.Struct("=IIQ")
_NEXT_ID: Final = struct.Struct("=III")


class ObjectKind(Enum):
    """Each kind has ids of its own: the commands to go through them and to open one."""

    PROGRAM = (Command.PROG_GET_NEXT_ID, Command.PROG_GET_FD_BY_ID)
    MAP = (Command.MAP_GET_NEXT_ID, Command.MAP_GET_FD_BY_ID)
    BTF = (Command.BTF_GET_NEXT_ID, Command.BTF_GET_FD_BY_ID)
    LINK = (Command.LINK_GET_NEXT_ID, Command.LINK_GET_FD_BY_ID)


def object_ids(kind: ObjectKind) -> Iterator[int]:
    """Ids of all objects of a kind in rising order, whoever made them.

    Raises:
        KernelError: the caller may not list them (CAP_SYS_ADMIN), or the kernel has none of the kind.
    """
    identifier = 0
    while True:
        attr = bytearray(_NEXT_ID.pack(identifier, 0, 0))
        try:
            bpf_inout(kind.value[0], attr)
        except KernelError as error:
            if error.errno == errno.ENOENT:
                return
            raise
        identifier = int(_NEXT_ID.unpack(attr)[1])
        yield identifier


def open_object(kind: ObjectKind, identifier: int) -> int | None:
    """A descriptor of the object, to be closed; None if it is gone, or a link that is just being made.

    Raises:
        KernelError: the caller may not open it (CAP_SYS_ADMIN).
    """
    try:
        return bpf(kind.value[1], _NEXT_ID.pack(identifier, 0, 0))
    except KernelError as error:
        # A link has its id before whoever makes it is done, and can be opened after that: Linux kernel commit a3b80e107894
        # ("bpf: Allocate ID for bpf_link") (in v5.8).
        if error.errno in (errno.ENOENT, errno.EAGAIN):
            return None
        raise


def describe(fd: int, request: bytes = b"") -> tuple[bytes, int]:
    """What the kernel tells of an object (`struct bpf_*_info`), and how many bytes of that it knows.

    Args:
        fd: of the object.
        request: how the structure begins that the kernel gets: buffers that it is to fill, and their sizes. The kernel
            refuses (E2BIG) what it does not know.
    """
    info = ctypes.create_string_buffer(request, _BYTES)
    attr = bytearray(_GET_INFO.pack(fd, _BYTES, ctypes.addressof(info)))
    bpf_inout(Command.OBJ_GET_INFO_BY_FD, attr)
    return info.raw, int(_GET_INFO.unpack(attr)[1])
