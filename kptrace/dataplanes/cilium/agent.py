# SPDX-License-Identifier: Apache-2.0
"""Cilium's agent among the processes."""

from pathlib import Path
from typing import Final

#: The agent's executable, whatever folder it is in.
AGENT: Final = "cilium-agent"


def find_agent(proc: Path, last: int | None) -> int | None:
    """The process whose executable is the agent's: the last one if it still is, else the one with the lowest id."""
    if last is not None and _is_agent(proc / str(last)):
        return last
    numbers = sorted(int(each.name) for each in proc.iterdir() if each.name.isdigit())
    return next((number for number in numbers if _is_agent(proc / str(number))), None)


def _is_agent(folder: Path) -> bool:
    try:
        executable = (folder / "exe").readlink()
    except OSError:  # gone, a kernel thread, or not ours to look at: then it is not to be seen
        return False
    return executable.name.removesuffix(" (deleted)") == AGENT
