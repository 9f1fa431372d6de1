# SPDX-License-Identifier: Apache-2.0

import os
from pathlib import Path

import pytest

from kptrace.experiments import netns
from kptrace.experiments.netns import Namespace, sweep
from kptrace.model.errors import KptraceError


def test_only_leftovers_of_dead_processes_are_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of other tools and of living processes stay."""
    (tmp_path / "proc" / "77").mkdir(parents=True)
    names = ["kpt-node-77-0a1b2c3d", "kpt-node-78-0a1b2c3d", "cni-1", "kpt-node-x", "kpt-node-78-zz"]
    for name in names:
        (tmp_path / "netns" / name).mkdir(parents=True)
    commands: list[list[str]] = []
    monkeypatch.setattr(netns.command, "run", commands.append)
    assert sweep(tmp_path / "netns", tmp_path / "proc") == ("kpt-node-78-0a1b2c3d",)
    assert commands == [["ip", "netns", "del", "kpt-node-78-0a1b2c3d"]]


def test_no_namespaces_at_all_is_nothing_to_sweep(tmp_path: Path) -> None:
    """A machine where nobody ever made a named namespace has no directory for them."""
    assert sweep(tmp_path / "missing") == ()


def test_names_are_of_this_process_and_never_the_same() -> None:
    """Two namespaces of one role differ, and carry the process id that `sweep` looks for."""
    names = {Namespace("node").name for _ in range(10)}
    assert len(names) == 10
    assert all(name.startswith(f"kpt-node-{os.getpid()}-") for name in names)


def test_a_namespace_that_was_not_made_cannot_be_entered() -> None:
    """Entering needs the context manager, and the error says so."""
    with pytest.raises(KptraceError, match="not there"):
        Namespace("node").call(lambda: None)
