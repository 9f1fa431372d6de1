# SPDX-License-Identifier: Apache-2.0
"""Programs, maps and links as bpftool lists them: the oracle of what kptrace and its experiments say of them."""

import json
import subprocess
from pathlib import Path
from typing import Any

from kptrace.kernel.objects import link_ids, map_ids, program_ids


def bpftool(*words: str) -> Any:
    """What bpftool answers, from its JSON."""
    return json.loads(
        subprocess.run(["bpftool", "-j", *words], capture_output=True, text=True, check=True).stdout
    )


def ids(kind: str) -> set[int]:
    """Ids of all objects of a kind (`prog`, `map`, `link`).

    By the system call that opens none, not by bpftool: Linux 6.18 never frees a map of tail calls that anybody opens by
    its id and closes again while the end of its last user is still being dealt with.
    """
    return set({"prog": program_ids, "map": map_ids, "link": link_ids}[kind]())


def run_count(program: int) -> int:
    """How often the kernel ran the program while somebody had statistics on."""
    return int(bpftool("prog", "show", "id", str(program)).get("run_cnt", 0))


def _bytes(words: list[str]) -> bytes:
    return bytes(int(word, 16) for word in words)


def entries(pin: Path) -> dict[bytes, bytes]:
    """Keys and values of a pinned map; in a per-CPU map the CPUs' values one after another."""
    found = {}
    for entry in bpftool("map", "dump", "pinned", str(pin)):
        values = entry.get("values", [entry])
        found[_bytes(entry["key"])] = b"".join(_bytes(value["value"]) for value in values)
    return found
