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
    PROG_ARRAY = 3
    PERCPU_HASH = 5
    PERCPU_ARRAY = 6
    LRU_HASH = 9
    LRU_PERCPU_HASH = 10
    LPM_TRIE = 11
    HASH_OF_MAPS = 13
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


def per_cpu_stride(value_size: int) -> int:
    """Bytes from one CPU's value to the next one's, where the kernel hands out all CPUs' values of an entry."""
    return -(-value_size // 8) * 8


def split_per_cpu(values: bytes, value_size: int) -> list[bytes]:
    """Each CPU's value of an entry that was read from a per-CPU map."""
    return [values[at : at + value_size] for at in range(0, len(values), per_cpu_stride(value_size))]


def lookup_element(fd: int, key: bytes, value_bytes: int) -> bytes | None:
    """The value under the key, or None; `value_bytes` is what the kernel will write: in a per-CPU map all CPUs' values."""
    value = ctypes.create_string_buffer(value_bytes)
    try:
        _element(fd, Command.MAP_LOOKUP_ELEM, key, ctypes.addressof(value))
    except KernelError as error:
        if error.errno == errno.ENOENT:
            return None
        raise
    return value.raw


def update_element(fd: int, key: bytes, value: bytes) -> None:
    """Write the value. Raises KernelError with E2BIG where the map is full."""
    buffer = ctypes.create_string_buffer(value, len(value))
    _element(fd, Command.MAP_UPDATE_ELEM, key, ctypes.addressof(buffer))


def next_key(fd: int, key: bytes | None, key_size: int) -> bytes | None:
    """The key after this one (None: the first), or None after the last; after a key that is gone, the first again."""
    following = ctypes.create_string_buffer(key_size)
    try:
        _element(fd, Command.MAP_GET_NEXT_KEY, key, ctypes.addressof(following))
    except KernelError as error:
        if error.errno == errno.ENOENT:
            return None
        raise
    return following.raw


def _element(fd: int, command: int, key: bytes | None, address: int) -> None:
    given = ctypes.create_string_buffer(key, len(key)) if key is not None else None
    bpf(
        command, struct.pack("=IIQQQ", fd, 0, ctypes.addressof(given) if given is not None else 0, address, 0)
    )


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
        return lookup_element(self.fd, key, self.spec.value_size)

    def lookup_per_cpu(self, key: bytes, cpus: int) -> list[bytes]:
        """The values under the key in a per-CPU array, one for each of the `cpus` that are possible."""
        values = lookup_element(self.fd, key, per_cpu_stride(self.spec.value_size) * cpus)
        if values is None:
            raise KernelError(f"{self.spec.name} has no entry {key.hex()}", errno=errno.ENOENT)
        return split_per_cpu(values, self.spec.value_size)

    def update(self, key: bytes, value: bytes) -> None:
        """Write the value. Raises KernelError with E2BIG where the map is full."""
        update_element(self.fd, key, value)

    def delete(self, key: bytes) -> bool:
        """Remove the key; whether it was there."""
        try:
            _element(self.fd, Command.MAP_DELETE_ELEM, key, 0)
        except KernelError as error:
            if error.errno == errno.ENOENT:
                return False
            raise
        return True

    def keys(self) -> Iterator[bytes]:
        """All keys, as one pass over a map that may change meanwhile sees them."""
        key = next_key(self.fd, None, self.spec.key_size)
        while key is not None:
            yield key
            key = next_key(self.fd, key, self.spec.key_size)

    def close(self) -> None:
        """Give up this process's hold on the map. Idempotent."""
        if self._memory is not None:
            self._memory.close()
            self._memory = None
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
