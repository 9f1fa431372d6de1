# SPDX-License-Identifier: Apache-2.0
"""A program that writes to maps which it inherited, as it is told: `map_writer.py STEPS`, JSON; prints what each returned.

A step is `[what, arguments...]`; `wait` waits for the end of its input. Descriptors are those of the process that started it.
"""

import ctypes
import json
import mmap
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterable

from kptrace.kernel.attach_datapath import attach_tcx, set_tail_call, update_link
from kptrace.kernel.load import ProgramType, load_program
from kptrace.kernel.syscall import bpf, bpf_inout
from kptrace.model.errors import KernelError

UPDATE, DELETE, TAKE, TAKE_BATCH, UPDATE_BATCH, DELETE_BATCH = 2, 3, 21, 25, 26, 27
RETURN_0 = struct.pack("=BBhiBBhi", 0xB7, 0, 0, 0, 0x95, 0, 0, 0)
LOOPBACK = 1


def key(number: int, size: int) -> bytes:
    """The key of an entry."""
    return number.to_bytes(4, "little").ljust(size, b"k")


def value(number: int, size: int) -> bytes:
    """The value of an entry."""
    return (number * 7).to_bytes(4, "little").ljust(size, b"v")


def _element(command: int, fd: int, number: int, key_size: int, value_size: int) -> int:
    key_buffer = ctypes.create_string_buffer(key(number, key_size), key_size)
    value_buffer = ctypes.create_string_buffer(value(number, value_size), value_size)
    given = 0 if command == DELETE else ctypes.addressof(value_buffer)
    try:
        return bpf(command, struct.pack("=IIQQQ", fd, 0, ctypes.addressof(key_buffer), given, 0))
    except KernelError as error:
        return -error.errno


def _batch(command: int, fd: int, numbers: Iterable[int], key_size: int, value_size: int) -> tuple[int, int]:
    """The call's result, and how many entries the kernel says it did."""
    every = list(numbers)
    keys = ctypes.create_string_buffer(b"".join(key(each, key_size) for each in every))
    values = ctypes.create_string_buffer(b"".join(value(each, value_size) for each in every))
    place = ctypes.create_string_buffer(64)
    attr = bytearray(
        struct.pack(
            "=QQQQIIQQ",
            0,
            ctypes.addressof(place),
            ctypes.addressof(keys),
            ctypes.addressof(values),
            len(every),
            fd,
            0,
            0,
        )
    )
    try:
        result = bpf_inout(command, attr)
    except KernelError as error:
        result = -error.errno
    return result, struct.unpack_from("=I", attr, 32)[0]


def _cold(fd: int, number: int, key_size: int, value_size: int) -> int:
    """An update whose attributes are in a page that the process never touched."""
    key_buffer = ctypes.create_string_buffer(key(number, key_size), key_size)
    value_buffer = ctypes.create_string_buffer(value(number, value_size), value_size)
    attr = struct.pack("=IIQQQ", fd, 0, ctypes.addressof(key_buffer), ctypes.addressof(value_buffer), 0)
    with tempfile.TemporaryFile() as file:
        file.write(attr.ljust(mmap.PAGESIZE, b"\0"))
        file.flush()
        memory = mmap.mmap(file.fileno(), mmap.PAGESIZE)
        libc = ctypes.CDLL(None, use_errno=True)
        address = (ctypes.c_char * mmap.PAGESIZE).from_buffer(memory)
        result = libc.syscall(321, UPDATE, address, len(attr))
        return int(result) if result >= 0 else -ctypes.get_errno()


def _programs(name: str, calls: int) -> int:
    """Load two programs, link the first to the loopback, replace it by the other, and make this a tail call's target."""
    first = load_program(name, RETURN_0, ProgramType.SCHED_CLS)
    second = load_program(f"{name}2", RETURN_0, ProgramType.SCHED_CLS)
    link = attach_tcx(first, LOOPBACK, ingress=True)
    update_link(link, second)
    set_tail_call(calls, 3, second)
    try:
        load_program("broken", RETURN_0[8:], ProgramType.SCHED_CLS)
    except KernelError as error:
        return -error.errno
    return 0


_SINGLE = {"update": UPDATE, "delete": DELETE, "take": TAKE}
_MANY = {"update_batch": UPDATE_BATCH, "delete_batch": DELETE_BATCH, "take_batch": TAKE_BATCH}


def _step(what: str, arguments: list[int]) -> object:
    if what == "wait":
        return sys.stdin.read()
    if what == "pause":
        return time.sleep(arguments[0] / 1e3)
    if what == "cold":
        return _cold(*arguments)
    fd, first, count, key_size, value_size = arguments
    numbers = range(first, first + count)
    if what in _MANY:
        return _batch(_MANY[what], fd, numbers, key_size, value_size)
    return [_element(_SINGLE[what], fd, each, key_size, value_size) for each in numbers]


def main() -> None:
    """Do all steps."""
    special: dict[str, Callable[..., object]] = {"programs": _programs}
    results = []
    for what, *arguments in json.loads(sys.argv[1]):
        results.append(special[what](*arguments) if what in special else _step(what, arguments))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
