# SPDX-License-Identifier: Apache-2.0
"""What each mechanism costs in instructions, in a test machine: repeatable to a tenth of a percent, unlike ns."""

import json
import shutil
import subprocess

from figures import HERE, ROOT, Figure

KERNEL = "6.12"
#: Above nothing, by way (design.md): for the others there is none.
BUDGETS = {"bracket, every packet": 600.0, "fentry, every packet": 650.0}


def instructions() -> list[Figure]:
    """Guest instructions per packet above nothing, through 1,000 rules."""
    out = ROOT / "build/vm" / KERNEL
    out.mkdir(parents=True, exist_ok=True)
    # Static: the test machine has another C library.
    loops = ["gcc", "-O2", "-static", "-o", str(out / "loops"), str(HERE / "loops.c")]
    subprocess.run(loops, check=True)
    shutil.copy(HERE / "guest.py", out / "guest.py")
    command = [str(ROOT / "tools/vm/run.py"), "--icount", "--time-limit", "3000", KERNEL, "--"]
    run = subprocess.run(
        [*command, "/opt/kptrace/bin/python /out/guest.py /out/loops"],
        check=True,
        capture_output=True,
        text=True,
    )
    line = next(line for line in run.stdout.splitlines() if line.startswith("instructions: "))
    figures = []
    for plane, ways in json.loads(line.partition(" ")[2]).items():
        nothing = ways.pop("nothing")
        figures.append(Figure(f"{plane}, {KERNEL}: one send, no tracer", nothing, "instructions"))
        for way, value in ways.items():
            if isinstance(value, str):
                raise RuntimeError(f"{plane}, {way}: {value}")
            figures.append(
                Figure(
                    f"{plane}, {KERNEL}: {way}, above that", value - nothing, "instructions", BUDGETS.get(way)
                )
            )
    return figures
