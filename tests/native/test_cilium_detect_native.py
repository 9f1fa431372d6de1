# SPDX-License-Identifier: Apache-2.0
"""Cilium's maps, programs and agent are found in the kernel, with its pins and without them."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kptrace.dataplanes.cilium import detect
from kptrace.dataplanes.cilium.agent import find_agent
from kptrace.dataplanes.cilium.detect import Detector
from kptrace.dataplanes.cilium.layouts import KERNEL_NAME, Role
from kptrace.dataplanes.cilium.service_state import FAMILY_OF, ServiceState
from kptrace.experiments.cilium_layouts import MapName, Version
from kptrace.experiments.cilium_maps import BpfFilesystem, CiliumMaps
from kptrace.kernel.host import Host
from kptrace.kernel.maps import Map, MapSpec, MapType
from kptrace.kernel.objects import map_info, program_info, set_pin
from kptrace.model.netfilter import IpFamily
from tests.native.objects_bench import closing, load, returning, using


@pytest.fixture
def bpffs() -> Iterator[Path]:
    """A BPF file system of the test's own."""
    with BpfFilesystem() as mounted:
        yield mounted.root


def ids_of(maps: CiliumMaps) -> dict[str, int]:
    """The kernel's ids of the maps, by whole name."""
    return {made.spec.name: map_info(made.fd).id for made in maps.maps.values()}


@pytest.mark.parametrize("version", [Version.CURRENT, Version.OLDER])
def test_all_maps_of_two_versions_are_found_by_their_pins(bpffs: Path, version: Version) -> None:
    """Each under its whole name; the one to read of each role is the one that is pinned here."""
    with CiliumMaps(bpffs, version) as maps:
        found = Detector(Host(bpffs=bpffs)).look()
        here = {each.name: each for role in found.maps.values() for each in role if each.pin is not None}
        assert {name: each.info.id for name, each in here.items()} == ids_of(maps)
        assert all(each.pin == bpffs / "tc/globals" / name for name, each in here.items())
        assert all(each.layout.role is not Role.OTHER for each in here.values())
        backends = maps.maps[MapName.BACKENDS4].spec.name
        assert found.maps[Role.LB4_BACKENDS][0].name == backends == found.layouts[Role.LB4_BACKENDS].name
        assert not [each for each in found.problems if str(bpffs) in each or "no layout" in each]
        assert found.present
        assert set(FAMILY_OF) <= set(found.layouts)
        assert ServiceState(found.layouts).families == set(IpFamily)


def test_unknown_layouts_cost_their_own_reader_only(bpffs: Path) -> None:
    """What is unknown is said; all other maps are there to be read."""
    with CiliumMaps(bpffs, Version.UNKNOWN) as maps:
        found = Detector(Host(bpffs=bpffs)).look()
        told = [each.split()[0] for each in found.problems]
        assert {"cilium_lb4_backends_v3", "cilium_lb6_backends_v4", "cilium_policy_v3_00042"} <= set(told)
        here = {each.name for role in found.maps.values() for each in role if each.pin is not None}
        assert here == ids_of(maps).keys() - set(told)


def test_without_the_bpf_file_system_maps_are_told_by_what_the_kernel_keeps(
    bpffs: Path, tmp_path: Path
) -> None:
    """15 characters and the sizes are enough for all maps that are read, and it is said that there is no more."""
    with CiliumMaps(bpffs) as maps:
        found = Detector(Host(bpffs=tmp_path)).look()
        roles = {
            each.info.id: (role, each.name) for role, each_role in found.maps.items() for each in each_role
        }
        pinned = Detector(Host(bpffs=bpffs)).look()
        for role, each_role in pinned.maps.items():
            for each in each_role:
                if each.pin is not None:
                    assert roles[each.info.id] == (role, each.name[:KERNEL_NAME])
        assert len(maps.maps) <= len(roles)
        assert [each for each in found.problems if f"no map is pinned in {tmp_path}" in each]


def test_maps_that_come_and_go_are_followed(bpffs: Path) -> None:
    """A pin that leads to another map is another one; what is gone is not there any more."""
    detector = Detector(Host(bpffs=bpffs))
    with CiliumMaps(bpffs) as maps:
        first = detector.look().maps[Role.LXC][0].info.id
        assert first == ids_of(maps)["cilium_lxc"]
    with CiliumMaps(bpffs) as maps:
        second = detector.look().maps[Role.LXC][0].info.id
        assert second == ids_of(maps)["cilium_lxc"] != first
    left = detector.look()
    assert all(each.info.id not in (first, second) for role in left.maps.values() for each in role)
    assert all(each.pin is None for role in left.maps.values() for each in role)


def test_looking_again_opens_nothing_and_leaks_nothing(bpffs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an id or a pin stands for never changes, and maps without a pin are left alone where there are pins."""
    opened: list[object] = []

    def counting(real: Callable[[object], int | None]) -> Callable[[object], int | None]:
        def count(what: object) -> int | None:
            opened.append(what)
            return real(what)

        return count

    with CiliumMaps(bpffs) as maps:
        for name in ("open_map", "open_program", "open_pin"):
            monkeypatch.setattr(detect, name, counting(getattr(detect, name)))
        detector = Detector(Host(bpffs=bpffs))
        detector.look()
        assert opened
        before = len(list(Path("/proc/self/fd").iterdir()))
        again = Map(MapSpec("kpt_stranger", MapType.HASH, 4, 4, 1))
        try:
            opened.clear()
            detector.look()
            assert map_info(again.fd).id not in opened
            assert not {*ids_of(maps).values(), *(maps.pin(name) for name in maps.maps)} & set(opened)
        finally:
            again.close()
        assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_programs_are_found_by_cut_names_with_their_endpoint(bpffs: Path) -> None:
    """Entry programs only; old names only if the program uses a map of Cilium's; replaced ones are others."""
    detector = Detector(Host(bpffs=bpffs))
    with CiliumMaps(bpffs) as maps:
        calls = Map(MapSpec("cilium_calls_00042", MapType.PROG_ARRAY, 4, 4, 50))
        set_pin(calls.fd, bpffs / "tc/globals/cilium_calls_00042")
        entry = load("cil_from_container", code=using(0, maps.maps[MapName.SERVICES4].fd, calls.fd))
        policy = load("cil_lxc_policy")
        stranger = load("from_netdev")
        old = load("from_netdev", code=using(0, maps.maps[MapName.LXC].fd))
        ids = [program_info(each).id for each in (entry, policy, stranger, old)]
        with closing(policy, stranger, old):
            found = {each.info.id: each for each in detector.look().programs}
            assert [number in found for number in ids] == [True, False, False, True]
            assert found[ids[0]].kind.chain == "from_container"
            assert found[ids[0]].info.name == "cil_from_contai"
            assert found[ids[0]].endpoint == 42
            assert found[ids[3]].endpoint is None
            os.close(entry)
            entry = load("cil_from_container", code=returning(0))
            with closing(entry):
                found = {each.info.id: each for each in detector.look().programs}
                assert ids[0] not in found
                assert found[program_info(entry).id].endpoint is None
        calls.close()


def test_the_agent_is_found_by_its_executable(tmp_path: Path) -> None:
    """Whatever the process calls itself, and for as long as it lives."""
    executable = tmp_path / "cilium-agent"
    shutil.copy(shutil.which("sleep") or "/bin/sleep", executable)
    others = find_agent(Path("/proc"), None)
    with subprocess.Popen([executable, "60"]) as process:
        try:
            assert find_agent(Path("/proc"), process.pid) == process.pid
            if others is None:
                assert find_agent(Path("/proc"), None) == process.pid
        finally:
            process.kill()
    assert find_agent(Path("/proc"), process.pid) != process.pid
