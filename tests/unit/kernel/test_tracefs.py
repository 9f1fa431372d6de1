# SPDX-License-Identifier: Apache-2.0
"""Where tracefs is found, and what is none."""

import os
from pathlib import Path

import pytest

from kptrace.kernel import tracefs
from kptrace.kernel.tracefs import Tracefs
from kptrace.model.errors import UnsupportedError


def test_the_hosts_mount_is_taken(tmp_path: Path) -> None:
    """An event's number is read from it, and an event that the kernel has not is said."""
    event = tmp_path / "kernel/debug/tracing/events/syscalls/sys_enter_sendmsg"
    event.mkdir(parents=True)
    (event / "id").write_text("1234\n")
    found = Tracefs(tmp_path)
    assert found.origin == str(tmp_path / "kernel/debug/tracing")
    assert found.event_id("syscalls", "sys_enter_sendmsg") == 1234
    with pytest.raises(UnsupportedError, match="syscalls:sys_enter_nothing"):
        found.event_id("syscalls", "sys_enter_nothing")
    found.close()


def test_an_empty_mount_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A confidential lockdown lets tracefs be mounted, without any events in it."""
    monkeypatch.setattr(tracefs, "_private_mount", lambda: os.open(tmp_path, os.O_PATH))
    before = sorted(Path("/proc/self/fd").iterdir())
    with pytest.raises(UnsupportedError, match="no events"):
        Tracefs(tmp_path / "nothing")
    assert sorted(Path("/proc/self/fd").iterdir()) == before
