# SPDX-License-Identifier: Apache-2.0
"""BPF maps: made, read and written by bpf(2); arrays that are mapped into memory are read without a system call."""

import ctypes
import errno
import mmap
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

from kptrace.kernel.syscall import Command, bpf
from kptrace.model.errors import KernelError

BPF_F_MMAPABLE = 1 << 10


class MapType(IntEnum):
    """`enum bpf_map_type`, as far as kptrace uses it."""

    HASH = 1
    ARRAY = 2
    PERCPU_HASH = 5
    PERCPU_ARRAY = 6
    LRU_HASH = 9
    RINGBUF = 27


@dataclass(frozen=True, slots=True)
class MapSpec:
    """What a map is to be: sizes in bytes, as the program's source declared them."""

    name: str
    type: MapType
    key_size: int
    value_size: int
    max_entries: int
    flags: int = 0


class Map:
    """One BPF map, owned by this process: it goes away with its last descriptor."""

    def __init__(self, spec: MapSpec) -> None:
        """Create the map in the kernel."""
        self.spec = spec
        attr = struct.pack(
            "<IIIIIII16s",
            spec.type,
            spec.key_size,
            spec.value_size,
            spec.max_entries,
            spec.flags,
            0,
            0,
            spec.name.encode()[:15],
        )
        self.fd = bpf(Command.MAP_CREATE, attr)
        self._memory: mmap.mmap | None = None

    def memory(self) -> mmap.mmap:
        """The values of a mappable array as one writable buffer; element i starts at i * (value size rounded to 8)."""
        if self._memory is None:
            size = -(-self.spec.value_size // 8) * 8 * self.spec.max_entries
            page = mmap.PAGESIZE
            self._memory = mmap.mmap(self.fd, -(-size // page) * page, mmap.MAP_SHARED)
        return self._memory

    def lookup(self, key: bytes) -> bytes | None:
        """The value under the key, or None. Not for per-CPU maps."""
        value = ctypes.create_string_buffer(self.spec.value_size)
        try:
            self._element(Command.MAP_LOOKUP_ELEM, key, ctypes.addressof(value))
        except KernelError as error:
            if error.errno == errno.ENOENT:
                return None
            raise
        return value.raw

    def lookup_per_cpu(self, key: bytes, cpus: int) -> list[bytes]:
        """The values under the key in a per-CPU array, one for each of the `cpus` that are possible."""
        size = -(-self.spec.value_size // 8) * 8
        values = ctypes.create_string_buffer(size * cpus)
        self._element(Command.MAP_LOOKUP_ELEM, key, ctypes.addressof(values))
        return [values.raw[at : at + self.spec.value_size] for at in range(0, size * cpus, size)]

    def update(self, key: bytes, value: bytes) -> None:
        """Write the value. Raises KernelError with E2BIG where the map is full."""
        buffer = ctypes.create_string_buffer(value, len(value))
        self._element(Command.MAP_UPDATE_ELEM, key, ctypes.addressof(buffer))

    def delete(self, key: bytes) -> bool:
        """Remove the key; whether it was there."""
        try:
            self._element(Command.MAP_DELETE_ELEM, key, 0)
        except KernelError as error:
            if error.errno == errno.ENOENT:
                return False
            raise
        return True

    def keys(self) -> Iterator[bytes]:
        """All keys, as one pass over a map that may change meanwhile sees them."""
        following = ctypes.create_string_buffer(self.spec.key_size)
        key: bytes | None = None
        while True:
            current = ctypes.create_string_buffer(key, self.spec.key_size) if key is not None else None
            address = ctypes.addressof(current) if current is not None else 0
            try:
                bpf(
                    Command.MAP_GET_NEXT_KEY,
                    struct.pack("<IIQQQ", self.fd, 0, address, ctypes.addressof(following), 0),
                )
            except KernelError as error:
                if error.errno == errno.ENOENT:
                    return
                raise
            key = following.raw
            yield key

    def _element(self, command: int, key: bytes, value_address: int) -> None:
        buffer = ctypes.create_string_buffer(key, len(key))
        bpf(command, struct.pack("<IIQQQ", self.fd, 0, ctypes.addressof(buffer), value_address, 0))

    def close(self) -> None:
        """Give up this process's hold on the map. Idempotent."""
        if self._memory is not None:
            self._memory.close()
            self._memory = None
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
