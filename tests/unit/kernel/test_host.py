# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest

from kptrace.kernel.host import Host


def test_every_path_is_below_the_given_roots(tmp_path: Path) -> None:
    """A container sees the host's file systems somewhere else; nothing may look at its own."""
    host = Host(proc=tmp_path / "proc", sys=tmp_path / "sys")
    paths = [
        host.vmlinux_btf,
        host.module_btf("nf_tables"),
        host.lockdown,
        host.kconfig,
    ]
    assert len(set(paths)) == len(paths)
    assert all(path.is_relative_to(tmp_path) for path in paths)


def test_the_roots_are_the_usual_ones_by_default() -> None:
    """Outside a container nothing need be said."""
    assert Host().vmlinux_btf == Path("/sys/kernel/btf/vmlinux")
    assert Host().kconfig == Path("/proc/config.gz")


@pytest.mark.parametrize(("text", "count"), [("0-1\n", 2), ("0\n", 1), ("0-3,8-11\n", 8), ("0,2-3\n", 3)])
def test_possible_cpus_are_counted(tmp_path: Path, text: str, count: int) -> None:
    """Ranges and single numbers add up to the number of values that a per-CPU map's entry has."""
    folder = tmp_path / "devices/system/cpu"
    folder.mkdir(parents=True)
    (folder / "possible").write_text(text)
    assert Host(sys=tmp_path).possible_cpus() == count
