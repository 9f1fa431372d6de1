# SPDX-License-Identifier: Apache-2.0
"""What of Cilium is in the kernel: its maps, by pin or by name and sizes, its entry programs, and its agent."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kptrace.dataplanes.cilium.agent import find_agent
from kptrace.dataplanes.cilium.layouts import PREFIX, Layout, Role
from kptrace.dataplanes.cilium.programs import ProgramKind, kind_of
from kptrace.dataplanes.cilium.recognise import UnknownLayout, recognise
from kptrace.kernel.host import Host
from kptrace.kernel.objects import (
    MapInfo,
    ProgramInfo,
    map_ids,
    map_info,
    open_map,
    open_pin,
    open_program,
    program_ids,
    program_info,
)
from kptrace.model.errors import KernelError

#: Where the agent pins its maps, in the BPF file system.
GLOBALS: Final = "tc/globals"
_PENDING: Final = ":pending"  # a map that the agent is about to put in the place of another


@dataclass(frozen=True, slots=True)
class FoundMap:
    """A map of Cilium's of a known layout.

    Attributes:
        layout: its layout (of role OTHER: not to be read).
        info: what the kernel tells of it.
        name: whole where it is or was pinned, else 15 characters of it.
        pin: where it is pinned; None where it is not, or the BPF file system is not to be seen.
    """

    layout: Layout
    info: MapInfo
    name: str
    pin: Path | None = None


@dataclass(frozen=True, slots=True)
class FoundProgram:
    """An entry program of Cilium's; it may be loaded and not attached.

    Attributes:
        kind: what it is.
        info: what the kernel told when it was first seen; counts are of then.
        endpoint: the id of its endpoint, by the call or policy map that it uses; None where those do not tell.
    """

    kind: ProgramKind
    info: ProgramInfo
    endpoint: int | None = None


@dataclass(frozen=True, slots=True)
class Datapath:
    """What of Cilium is there.

    Attributes:
        maps: of each role that has any: first the one to read (pinned before not pinned, newer layout before older).
        programs: entry programs in the order in which they were loaded.
        agent: process id of the agent, None if it is not running or not to be seen.
        problems: what cannot be read, and why, for a person.
    """

    maps: Mapping[Role, tuple[FoundMap, ...]]
    programs: tuple[FoundProgram, ...]
    agent: int | None
    problems: tuple[str, ...]

    @property
    def layouts(self) -> dict[Role, Layout]:
        """The layout of the map to read for each role."""
        return {role: found[0].layout for role, found in self.maps.items()}

    @property
    def present(self) -> bool:
        """Whether anything of Cilium's is in the kernel."""
        return bool(self.maps or self.programs or self.problems)


class Detector:
    """Looks when asked. What was seen once is not asked again, so looking every few seconds is cheap."""

    def __init__(self, host: Host = Host()) -> None:
        """Nothing is known yet.

        Args:
            host: where the BPF file system and procfs are.
        """
        self._host = host
        self._pinned: dict[tuple[str, int], int] = {}
        self._names: dict[int, str] = {}
        self._maps: dict[int, MapInfo | None] = {}
        self._programs: dict[int, ProgramInfo | None] = {}
        self._agent: int | None = None

    def look(self) -> Datapath:
        """What is there now; empty where Cilium is not."""
        problems: list[str] = []
        pins = self._pins(problems)
        maps = self._look_at_maps(pins, problems)
        programs = self._look_at_programs(maps, problems)
        if maps or programs:
            self._agent = find_agent(self._host.proc, self._agent)
        else:
            self._agent = None
        roles: dict[Role, list[FoundMap]] = {}
        for found in sorted(
            maps.values(), key=lambda each: (each.pin is None, -each.layout.generation, -each.info.id)
        ):
            roles.setdefault(found.layout.role, []).append(found)
        return Datapath(
            {role: tuple(found) for role, found in roles.items()},
            programs,
            self._agent,
            tuple(dict.fromkeys(problems)),
        )

    def _pins(self, problems: list[str]) -> dict[int, Path]:
        """Paths of Cilium's pinned maps by map id."""
        folder = self._host.bpffs / GLOBALS
        try:
            with os.scandir(folder) as entries:
                seen = [
                    (entry.name, entry.inode())
                    for entry in entries
                    if entry.name.startswith(PREFIX) and not entry.name.endswith(_PENDING)
                ]
        except FileNotFoundError:
            seen = []
        except OSError as error:
            problems.append(f"cannot list the pins in {folder}: {error.strerror}")
            seen = []
        known = self._pinned
        self._pinned = {}
        found: dict[int, Path] = {}
        for name, inode in sorted(seen):
            number = known.get((name, inode))
            if number is None:
                try:
                    number = self._ask_pin(folder / name)
                except KernelError as error:
                    problems.append(f"cannot open the pinned map {folder / name}: {error}")
                    continue
            self._pinned[name, inode] = number
            self._names[number] = name
            found[number] = folder / name
        return found

    def _ask_pin(self, path: Path) -> int:
        fd = open_pin(path)
        try:
            info = map_info(fd)
        finally:
            os.close(fd)
        self._maps[info.id] = info
        return info.id

    def _look_at_maps(self, pins: Mapping[int, Path], problems: list[str]) -> dict[int, FoundMap]:
        ids = set(pins)
        if not pins:
            try:
                ids = self._ask_all_maps()
            except KernelError as error:
                problems.append(f"cannot go through the maps in the kernel: {error}")
        self._maps = {number: info for number, info in self._maps.items() if number in ids}
        self._names = {number: name for number, name in self._names.items() if number in ids}
        found: dict[int, FoundMap] = {}
        for number, info in self._maps.items():
            if info is None:
                continue
            name = self._names.get(number, "")
            layout = recognise(name, info.name, info.type, info.key_size, info.value_size)
            if isinstance(layout, UnknownLayout):
                problems.append(layout.detail)
            elif layout is not None:
                found[number] = FoundMap(layout, info, name or info.name, pins.get(number))
        if found and not pins:
            problems.append(
                f"no map is pinned in {self._host.bpffs / GLOBALS}: maps are told by 15 characters of their names, and sizes"
            )
        return found

    def _ask_all_maps(self) -> set[int]:
        """Ids of all maps, those that are new opened once.

        Only where there are no pins to open maps by: on Linux 6.18 a map of tail calls is never freed that is opened by its
        id, and closed again, while the end of its last user is still being handled (seen with bpftool too), and every
        regeneration of an endpoint leaves such a map for a moment.
        """
        ids = set(map_ids())
        for number in ids - self._maps.keys():
            self._maps[number] = _ask_map(number)
        return ids

    def _look_at_programs(
        self, maps: Mapping[int, FoundMap], problems: list[str]
    ) -> tuple[FoundProgram, ...]:
        try:
            ids = set(program_ids())
            for number in ids - self._programs.keys():
                self._programs[number] = _ask_program(number)
        except KernelError as error:
            problems.append(f"cannot go through the programs in the kernel: {error}")
            ids = set()
        self._programs = {number: info for number, info in self._programs.items() if number in ids}
        found = []
        for _, info in sorted(self._programs.items()):
            kind = kind_of(info.name) if info is not None else None
            if info is None or kind is None:
                continue
            if kind.certain or any(number in maps for number in info.map_ids):
                found.append(FoundProgram(kind, info, self._endpoint(info.map_ids, maps)))
        return tuple(found)

    def _endpoint(self, used: Iterable[int], maps: Mapping[int, FoundMap]) -> int | None:
        """Of a name that was cut, the end is not an endpoint's id."""
        for number in used:
            if number in maps and number in self._names:
                endpoint = maps[number].layout.endpoint(self._names[number])
                if endpoint is not None:
                    return endpoint
        return None


def _ask_map(number: int) -> MapInfo | None:
    """A map of Cilium's; None for others', and if it is gone."""
    fd = open_map(number)
    if fd is None:
        return None
    try:
        info = map_info(fd)
    finally:
        os.close(fd)
    return info if info.name.startswith(PREFIX) else None


def _ask_program(number: int) -> ProgramInfo | None:
    """What may be an entry program of Cilium's; None for others', and if it is gone."""
    fd = open_program(number)
    if fd is None:
        return None
    try:
        info = program_info(fd)
    finally:
        os.close(fd)
    return info if kind_of(info.name) is not None else None
