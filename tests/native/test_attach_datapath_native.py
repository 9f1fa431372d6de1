# SPDX-License-Identifier: Apache-2.0
"""Attaching programs that handle packets and connections: what the link tells, and that the program runs."""

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from kptrace.experiments.netns import Namespace
from kptrace.kernel import objects
from kptrace.kernel.attach_datapath import attach_cgroup, attach_tcx, attach_xdp, set_tail_call, update_link
from kptrace.kernel.load import AttachType, ProgramType
from kptrace.kernel.maps import Map, MapSpec, MapType
from kptrace.kernel.objects import (
    link_info,
    program_info,
)
from kptrace.kernel.run_statistics import RunStatistics
from tests.native.objects_bench import bpftool, closing, load, returning, run, tail_calling

_RUNS = 1009
_DATAGRAMS = 127


def _datagrams() -> None:
    """Send and receive datagrams over the loopback of the calling thread's namespace."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        one.bind(("127.0.0.1", 0))
        for _ in range(_DATAGRAMS):
            one.sendto(b"x", one.getsockname())
            one.recv(1)


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A cgroup of the test's own."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    root = next((Path(fields[1]) for fields in mounts if fields[2] == "cgroup2"), None)
    if root is None:
        pytest.skip("needs cgroup v2")
    path = root / f"kpt-test-{os.getpid()}"
    path.mkdir()
    yield path
    path.rmdir()


@pytest.mark.parametrize("ingress", [True, False])
def test_a_tcx_link_tells_its_device_and_direction(namespace: Namespace, ingress: bool) -> None:
    """Device, direction and program are those that it was made with, and its program sees the packets."""
    program = load("kpt_tcx", code=returning(-1))  # TCX_NEXT
    link = namespace.call(lambda: attach_tcx(program, 1, ingress))
    with closing(program, link), RunStatistics():
        info = link_info(link)
        assert (info.type, info.ifindex, info.program) == (
            objects.LinkType.TCX,
            1,
            program_info(program).id,
        )
        assert info.attach_type == (AttachType.TCX_INGRESS if ingress else AttachType.TCX_EGRESS)
        namespace.call(_datagrams)
        assert program_info(program).run_count == _DATAGRAMS


def test_an_xdp_link_tells_its_device(namespace: Namespace) -> None:
    """The device is the one on which ip sees the program."""
    program = load("kpt_xdp", ProgramType.XDP, code=returning(2))  # XDP_PASS
    link = namespace.call(lambda: attach_xdp(program, 1, generic=True))
    with closing(program, link):
        info = link_info(link)
        (device,) = json.loads(namespace.run(["ip", "-j", "link", "show", "lo"]))
        assert device["xdp"]["prog"]["id"] == info.program == program_info(program).id
        assert (info.type, info.ifindex, info.attach_type) == (objects.LinkType.XDP, 1, AttachType.XDP)
        assert bpftool("link", "show", "id", info.id)["prog_id"] == info.program


def test_a_cgroup_link_tells_its_cgroup(cgroup: Path) -> None:
    """The cgroup is the directory's inode, and bpftool agrees on program and hook."""
    program = load("kpt_sock", ProgramType.CGROUP_SOCK_ADDR, AttachType.CGROUP_INET6_CONNECT, returning(1))
    directory = os.open(cgroup, os.O_RDONLY)
    link = attach_cgroup(program, directory, AttachType.CGROUP_INET6_CONNECT)
    with closing(program, link, directory):
        info = link_info(link)
        shown = bpftool("link", "show", "id", info.id)
    assert info.cgroup == shown["cgroup_id"] == cgroup.stat().st_ino
    assert (info.type, info.attach_type) == (objects.LinkType.CGROUP, AttachType.CGROUP_INET6_CONNECT)
    assert "inet6_connect" in shown["attach_type"]


def test_a_link_gets_another_program(namespace: Namespace) -> None:
    """After the update the link, the same one, names the other program."""
    first, second = load("kpt_old", code=returning(-1)), load("kpt_new", code=returning(-1))
    link = namespace.call(lambda: attach_tcx(first, 1, True))
    with closing(first, second, link):
        before = link_info(link)
        update_link(link, second)
        after = link_info(link)
        assert (before.program, after.program) == (program_info(first).id, program_info(second).id)
        assert before.id == after.id


def test_a_tail_call_reaches_the_program_that_was_set() -> None:
    """A run returns the target's code, or the caller's own where no target is set; only entries are counted as runs."""
    calls = Map(MapSpec("kpt_calls", MapType.PROG_ARRAY, 4, 4, 8))
    entry, target = load("kpt_entry", code=tail_calling(calls.fd, 5, 3)), load("kpt_tail", code=returning(11))
    with closing(entry, target), RunStatistics():
        assert run(entry, 1) == 3
        set_tail_call(calls.fd, 5, target)
        assert run(entry, _RUNS) == 11
        assert (program_info(entry).run_count, program_info(target).run_count) == (_RUNS + 1, 0)
    calls.close()
