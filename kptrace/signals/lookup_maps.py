# SPDX-License-Identifier: Apache-2.0
"""The maps that every mechanism of the lookup signal has: bpf/include/kptrace/sampling.h has the same layout."""

import os
import struct

from kptrace.kernel.bytecode import Bytecode
from kptrace.kernel.host import Host
from kptrace.kernel.maps import Map
from kptrace.signals.sampling import Sampling

_CONFIG = struct.Struct("=QQQ")
_CPU = struct.Struct("=QQQ")
_FIRST = struct.pack("=I", 0)


class LookupMaps:
    """Maps in the kernel, and what is attached to use them; everything goes away with `close`, or with the process."""

    def __init__(self, bytecode: Bytecode, host: Host = Host()) -> None:
        """Make the maps; nothing is attached yet."""
        self._cpus = host.possible_cpus()
        self._code = bytecode
        self._maps = {name: Map(spec) for name, spec in bytecode.maps.items()}
        self._fds = {name: each.fd for name, each in self._maps.items()}
        self._attached: list[int] = []

    def configure(self, *, armed: bool, sampling: Sampling) -> None:
        """Switch counting on or off and set the sampling for every program at once."""
        first, rest = sampling.thresholds()
        self._maps["config"].memory()[: _CONFIG.size] = _CONFIG.pack(int(armed), first, rest)

    def memory(self, name: str) -> memoryview:
        """A map's values, live."""
        return memoryview(self._maps[name].memory())

    def opened(self) -> tuple[int, int]:
        """About how many sampled first packets, and how many others, ever opened a slot: for estimates of cost."""
        values = [_CPU.unpack(value) for value in self._maps["cpus"].lookup_per_cpu(_FIRST, self._cpus)]
        return sum(first for _, first, _ in values), sum(rest for _, _, rest in values)

    def close(self) -> None:
        """Detach and free. Idempotent."""
        while self._attached:
            os.close(self._attached.pop())
        for each in self._maps.values():
            each.close()
