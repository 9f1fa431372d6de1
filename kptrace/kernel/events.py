# SPDX-License-Identifier: Apache-2.0
"""Reading a BPF ring buffer through libbpf, which knows the memory barriers."""

import ctypes
import ctypes.util
from collections.abc import Callable

from kptrace.model.errors import KernelError, UnsupportedError

_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


class RingBuffer:
    """One ring buffer map and the function that gets its records.

    `fd` becomes readable when records wait: give it to the loop, and call `consume` from there.
    """

    def __init__(self, map_fd: int, on_record: Callable[[bytes], None]) -> None:
        """Open the ring.

        Raises:
            UnsupportedError: libbpf is not installed.
            KernelError: libbpf refused the map.
        """
        try:
            self._libbpf = ctypes.CDLL("libbpf.so.1", use_errno=True)
        except OSError as error:
            raise UnsupportedError(
                f"libbpf.so.1 cannot be loaded: {error}",
                remedy="install Debian's python3-bpfcc, which brings libbpf1",
            ) from error
        self._libbpf.ring_buffer__new.restype = ctypes.c_void_p
        self._libbpf.ring_buffer__new.argtypes = [ctypes.c_int, _CALLBACK, ctypes.c_void_p, ctypes.c_void_p]
        self._libbpf.ring_buffer__epoll_fd.argtypes = [ctypes.c_void_p]
        self._libbpf.ring_buffer__consume.argtypes = [ctypes.c_void_p]
        self._libbpf.ring_buffer__free.argtypes = [ctypes.c_void_p]
        self._failure: BaseException | None = None

        def receive(_context: object, data: int, size: int) -> int:
            # An exception cannot cross C: keep the first, and raise it from consume().
            try:
                on_record(ctypes.string_at(data, size))
            except BaseException as error:  # noqa: BLE001  (raised again by consume)
                self._failure = self._failure or error
            return 0

        self._callback = _CALLBACK(receive)  # libbpf keeps the pointer, so this object must live as long
        self._ring: int | None = self._libbpf.ring_buffer__new(map_fd, self._callback, None, None)
        if not self._ring:
            raise KernelError("libbpf cannot open the ring buffer", errno=ctypes.get_errno())

    @property
    def fd(self) -> int:
        """The epoll descriptor that tells of waiting records."""
        return int(self._libbpf.ring_buffer__epoll_fd(self._ring))

    def consume(self) -> int:
        """Hand all waiting records over; return how many. Raises what the receiver raised first."""
        count = int(self._libbpf.ring_buffer__consume(self._ring)) if self._ring else 0
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        return count

    def close(self) -> None:
        """Free the ring. Idempotent."""
        if self._ring:
            self._libbpf.ring_buffer__free(self._ring)
            self._ring = None
