# SPDX-License-Identifier: Apache-2.0
"""A map that somebody else owns: read only, whatever happens to it meanwhile."""

import ctypes
import errno
import os
import struct
from collections.abc import Iterator
from typing import Final

from kptrace.kernel.maps import MapType, lookup_element, next_key, per_cpu_stride
from kptrace.kernel.objects import MapInfo
from kptrace.kernel.syscall import Command, bpf_inout
from kptrace.model.errors import KernelError

_PER_CPU: Final = (MapType.PERCPU_HASH, MapType.PERCPU_ARRAY, MapType.LRU_PERCPU_HASH)
_BATCH: Final = struct.Struct("=QQQQIIQQ")  # in_batch, out_batch, keys, values, count, map_fd, two flags
_BATCH_ENTRIES: Final = 512
# The kernel's own ENOTSUPP, which no header for programs has; EINVAL comes from kernels before batches.
_NO_BATCHES: Final = (524, errno.EINVAL, errno.EOPNOTSUPP)
# An entry that is deleted while a batch is read ends that batch. So many times in a row, and with nothing read, single
# entries are read instead.
_INTERRUPTIONS: Final = 8


class _Batches:
    """The state of one pass in batches: where the next one begins, and the buffers."""

    def __init__(self, fd: int, key_size: int, value_bytes: int) -> None:
        self._fd, self._key_size, self._value_bytes = fd, key_size, value_bytes
        # A hash keeps the number of a bucket here, the others a key.
        self._next = ctypes.create_string_buffer(max(key_size, 4))
        self._begun = False
        self.grow(_BATCH_ENTRIES)

    def grow(self, room: int) -> None:
        """Make room for so many entries."""
        self.room = room
        self._keys = ctypes.create_string_buffer(self._key_size * room)
        self._values = ctypes.create_string_buffer(self._value_bytes * room)

    def fetch(self) -> tuple[int, int]:
        """Read on; how many entries came, and the errno that the kernel ended with."""
        following = ctypes.create_string_buffer(len(self._next))
        attr = bytearray(
            _BATCH.pack(
                ctypes.addressof(self._next) if self._begun else 0,
                ctypes.addressof(following),
                ctypes.addressof(self._keys),
                ctypes.addressof(self._values),
                self.room,
                self._fd,
                0,
                0,
            )
        )
        code = 0
        try:
            bpf_inout(Command.MAP_LOOKUP_BATCH, attr)
        except KernelError as error:
            code = error.errno
            if code not in (errno.ENOENT, errno.ENOSPC, errno.EINTR, *_NO_BATCHES):
                raise
        # Where the kernel has no batches it leaves the number as it was.
        count = 0 if code in (errno.ENOSPC, *_NO_BATCHES) else int(_BATCH.unpack(attr)[4])
        if code == 0 or count:
            self._next, self._begun = following, True
        return count, code

    def entries(self, count: int) -> Iterator[tuple[bytes, bytes]]:
        """What the last fetch brought."""
        keys, values = self._keys.raw, self._values.raw
        for n in range(count):
            yield (
                keys[n * self._key_size : (n + 1) * self._key_size],
                values[n * self._value_bytes : (n + 1) * self._value_bytes],
            )


class ForeignMap:
    """One map of another owner. This object owns the descriptor, never the map."""

    def __init__(self, fd: int, info: MapInfo, cpus: int) -> None:
        """Take over the descriptor.

        Args:
            fd: of the map; `close` closes it.
            info: what `map_info` told of it.
            cpus: how many CPUs the kernel may ever have (`Host.possible_cpus`): so many values has an entry of a per-CPU map.
        """
        self.info: Final = info
        self._fd = fd
        self._cpus: Final = cpus

    @property
    def value_bytes(self) -> int:
        """Bytes of a value as they are read: in a per-CPU map those of all CPUs (`split_per_cpu` parts them)."""
        if self.info.type in _PER_CPU:
            return per_cpu_stride(self.info.value_size) * self._cpus
        return self.info.value_size

    def read(self, at_most: int) -> Iterator[tuple[bytes, bytes]]:
        """Keys and values as one pass over a map that changes meanwhile sees them; no more than `at_most`.

        Ask for one more than is wanted to learn whether there are more. Entries that stay are seen at least once.

        Raises:
            KernelError: the map's owner, or its type, does not let it be read.
        """
        left = at_most
        for entries, count in self._pass():
            for _, entry in zip(range(min(count, left)), entries, strict=False):
                yield entry
            left -= count
            if left <= 0:
                return

    def count(self, at_most: int) -> int:
        """How many entries a pass over the map sees, `at_most` if there are more."""
        found = 0
        for count in self.counts():
            found += count
            if found >= at_most:
                return at_most
        return found

    def counts(self) -> Iterator[int]:
        """How many entries each step of a pass over the map sees: between two the caller may rest, or give up."""
        for _, count in self._pass():
            yield count

    def lookup(self, key: bytes) -> bytes | None:
        """The value under the key (of `value_bytes`), or None."""
        return lookup_element(self._fd, key, self.value_bytes)

    def close(self) -> None:
        """Close the descriptor. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _pass(self) -> Iterator[tuple[Iterator[tuple[bytes, bytes]], int]]:
        """Entries and their number, batch by batch."""
        batches = _Batches(self._fd, self.info.key_size, self.value_bytes)
        interruptions = 0
        while True:
            count, code = batches.fetch()
            if count:
                interruptions = 0
                yield batches.entries(count), count
            if code == errno.ENOENT:
                return
            if code == errno.ENOSPC:
                # One bucket of a hash has more than there is room for; none has more than the map.
                if batches.room >= self.info.max_entries:
                    raise KernelError(f"the map {self.info.name} has a bucket larger than itself", errno=code)
                batches.grow(min(2 * batches.room, self.info.max_entries))
            elif code == errno.EINTR:
                interruptions += not count
            if code in _NO_BATCHES or interruptions > _INTERRUPTIONS:
                for entry in self._one_by_one():
                    yield iter((entry,)), 1
                return

    def _one_by_one(self) -> Iterator[tuple[bytes, bytes]]:
        """For types of maps, and kernels, without batches."""
        key: bytes | None = None
        # From a key that was deleted meanwhile the kernel begins again: the keys seen bound how long this can go on.
        seen: set[bytes] = set()
        for _ in range(2 * self.info.max_entries + _BATCH_ENTRIES):
            key = next_key(self._fd, key, self.info.key_size)
            if key is None:
                return
            if key not in seen:
                seen.add(key)
                value = self.lookup(key)
                if value is not None:
                    yield key, value
