# SPDX-License-Identifier: Apache-2.0
"""Whose run a process belongs to. Pure but for what it asks the process table."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from kptrace.model.rewrite import ProcessRun
from kptrace.signals.sync_tools import find_tool
from kptrace.signals.writers import OTHER, Writers


class Owner(NamedTuple):
    """The process that a process works for, and its class."""

    tgid: int
    writer: str


def find_owner(
    chain: Sequence[ProcessRun],
    writers: Writers,
    cgroup: Callable[[ProcessRun], str] = lambda _: "",
    writer: str = "",
) -> Owner:
    """Who starts a process for its own purposes.

    That is the outermost of the ancestors that have the class by themselves, and of a tool without one its parent (the
    script that runs it); of anything else it is the process itself.

    Args:
        chain: the process and its ancestors, nearest first, in the watched network namespace; not empty.
        writers: the classes.
        cgroup: path of a process's cgroup.
        writer: its class, where that is known already (`Rewrite.writer`).
    """
    name = writer or writers.classify(chain, watched_netns=True, cgroup=cgroup)
    if name != OTHER:
        for run in reversed(chain):
            if writers.classify([run], watched_netns=True, cgroup=cgroup) == name:
                return Owner(run.tgid, name)
    first = chain[0]
    if find_tool(first.executable, first.comm) is None:
        return Owner(first.tgid, name)
    parent = chain[1].tgid if len(chain) > 1 else first.parent
    return Owner(parent if parent > 1 else first.tgid, name)
