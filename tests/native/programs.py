# SPDX-License-Identifier: Apache-2.0
"""Which BPF programs the kernel holds, as bpftool lists them."""

import json
import subprocess


def program_ids(names: tuple[str, ...]) -> set[int]:
    """Ids of the programs with these names, whoever loaded them: an id is never used twice, and freeing takes a moment."""
    listed = subprocess.run(
        ["bpftool", "-j", "prog", "list"], capture_output=True, text=True, check=True
    ).stdout
    return {program["id"] for program in json.loads(listed) if program.get("name") in names}
