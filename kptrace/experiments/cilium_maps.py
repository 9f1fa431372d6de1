# SPDX-License-Identifier: Apache-2.0
"""Cilium's maps, made and pinned as its agent does, in a BPF file system of the experiment's own."""

import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Self

from kptrace.experiments import cilium_entries as encode
from kptrace.experiments import cilium_layouts as layouts
from kptrace.experiments import command
from kptrace.experiments.cilium_layouts import ENDPOINT, GLOBALS, LAYOUTS, MapName, Version
from kptrace.experiments.interrupts import unhurried
from kptrace.kernel.maps import Map
from kptrace.kernel.memlock import raise_memlock
from kptrace.kernel.objects import set_pin

_PREFIX = "kptrace-bpffs-"
_NAME = re.compile(rf"{_PREFIX}(\d+)-\w+")
#: Identities: of the experiment's container, and that of everything outside.
_CONTAINER, _WORLD = 20042, 2


def sweep_bpffs(directory: Path | None = None, proc: Path = Path("/proc")) -> tuple[Path, ...]:
    """Remove file systems that dead processes of ours left behind (SIGKILL), with all that is pinned in them."""
    removed = []
    for path in sorted((directory or Path(tempfile.gettempdir())).iterdir()):
        match = _NAME.fullmatch(path.name)
        if match and not (proc / match[1]).exists():
            if path.is_mount():
                command.run(["umount", "--lazy", str(path)])
            path.rmdir()
            removed.append(path)
    return tuple(removed)


class BpfFilesystem:
    """A mounted BPF file system; a context manager that unmounts it, and with it removes every pin.

    Attributes:
        root: where it is mounted.
    """

    def __init__(self) -> None:
        self.root = Path()

    def __enter__(self) -> Self:
        sweep_bpffs()
        self.root = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-"))
        try:
            command.run(["mount", "-t", "bpf", "bpf", str(self.root)])
        except BaseException:
            self.root.rmdir()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with unhurried():
            # Lazy: whoever looks into it at this moment keeps it a moment longer.
            command.run(["umount", "--lazy", str(self.root)])
            self.root.rmdir()


class CiliumMaps:
    """The maps of one version of the agent, pinned under `tc/globals`; a context manager that removes them.

    Attributes:
        root: of the BPF file system.
        version: whose layouts they have.
        maps: by what they are for.
    """

    def __init__(
        self, root: Path, version: Version = Version.CURRENT, *, entries: int = layouts.SERVICES
    ) -> None:
        """Make and pin them.

        Args:
            root: of the BPF file system.
            version: whose layouts.
            entries: for so many there is room in each map of Services and back ends.

        Raises:
            KernelError: the kernel refused one.
        """
        raise_memlock()
        self.root = root
        self.version = version
        self._made: dict[MapName, Map] = {}
        self.maps: Mapping[MapName, Map] = MappingProxyType(self._made)
        try:
            (root / GLOBALS).mkdir(parents=True, exist_ok=True)
            for name, spec in LAYOUTS[version].items():
                room = entries if name in layouts.LOAD_BALANCING else spec.max_entries
                self._made[name] = Map(replace(spec, max_entries=room))
                set_pin(self._made[name].fd, self.pin(name))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def fds(self) -> dict[str, int]:
        """Descriptors by the names that the programs' sources have for the maps."""
        return {name.name.lower(): made.fd for name, made in self._made.items()}

    def pin(self, name: MapName) -> Path:
        """Where a map is pinned."""
        return self.root / GLOBALS / LAYOUTS[self.version][name].name

    def add_endpoint(self, ip: str, ifindex: int, network: str) -> None:
        """What the agent writes of a container: where it is, whose addresses are known, and what it may talk to."""
        lxc, ipcache, policy = (self._made[name] for name in (MapName.LXC, MapName.IPCACHE, MapName.POLICY))
        lxc.update(encode.endpoint_key(ip), encode.endpoint_value(ifindex, ENDPOINT, _CONTAINER))
        for where, identity in ((network, _CONTAINER), ("0.0.0.0/0", _WORLD), ("::/0", _WORLD)):
            ipcache.update(*encode.ipcache_entry(where, identity, ipcache.spec.value_size))
        for egress in (False, True):
            policy.update(*encode.allow_entry(policy.spec.key_size, policy.spec.value_size, egress=egress))

    def close(self) -> None:
        """Remove the pins and give up the maps. Idempotent."""
        with unhurried():
            for name, made in self._made.items():
                self.pin(name).unlink(missing_ok=True)
                made.close()
