# SPDX-License-Identifier: Apache-2.0
"""What each mechanism costs in instructions, in a test machine: repeatable to a tenth of a percent, unlike ns."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from figures import HERE, ROOT, Figure
from page import table

KERNEL = "6.12"
NOTHING = "nothing"
#: Above nothing, by way, for one walk (design.md): the others have none.
BUDGETS = {"bracket, every packet": 600.0, "fentry, every packet": 650.0}
_MARK = "instructions: "
_SECONDS = "3000"


@dataclass(frozen=True)
class Row:
    """What the test machine gave for one way on one data plane.

    Attributes:
        plane, way: which.
        sent: packets while it was attached.
        instructions: of one send, the least of some rounds.
        timed, lost: samples and unpaired packets, where the way tells.
        mean: of the samples, in the clock that counts instructions.
    """

    plane: str
    way: str
    sent: int
    instructions: float
    timed: int | None = None
    lost: int | None = None
    mean: float | None = None


def instructions() -> tuple[str, list[Figure]]:
    """The section of docs/overhead.md, and the figures that have budgets.

    Raises:
        RuntimeError: a way does not work there.
    """
    out = ROOT / "build/vm" / KERNEL
    out.mkdir(parents=True, exist_ok=True)
    # Static: the test machine has another C library.
    subprocess.run(["gcc", "-O2", "-static", "-o", str(out / "loops"), str(HERE / "loops.c")], check=True)
    shutil.copy(HERE / "guest.py", out / "guest.py")
    rows = [read(line) for line in _guest() if line.startswith(_MARK)]
    if not rows:
        raise RuntimeError("the test machine gave no figures")
    release = (out / "release.txt").read_text(encoding="utf-8").strip()
    return section(rows, release), figures(rows)


def _guest() -> list[str]:
    command = [
        sys.executable,
        str(ROOT / "tools/vm/run.py"),
        "--icount",
        "--time-limit",
        _SECONDS,
        KERNEL,
        "--",
    ]
    # Not in the working tree: the installed kptrace is measured.
    inside = "uname -r >/out/release.txt && cd / && /opt/kptrace/bin/python /out/guest.py /out/loops"
    lines = []
    with subprocess.Popen([*command, inside], stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            lines.append(line)
    if process.returncode:
        raise RuntimeError(f"the test machine ended with {process.returncode}")
    return lines


def read(line: str) -> Row:
    """One line of tools/bench/guest.py."""
    found = json.loads(line.removeprefix(_MARK))
    if "error" in found:
        raise RuntimeError(f"{found['plane']}, {found['way']}: {found['error']}")
    return Row(**found)


def above(rows: list[Row], row: Row) -> float:
    """Instructions of a send more than without a tracer."""
    nothing = next(each for each in rows if (each.plane, each.way) == (row.plane, NOTHING))
    return row.instructions - nothing.instructions


def walks(row: Row, rows: list[Row]) -> float:
    """How often a packet walks the rules that the way times: the walks that the way timed without sampling, a packet."""
    mechanism = row.way.partition(",")[0]
    every = [each for each in rows if each.plane == row.plane and each.timed and "every" in each.way]
    same = next((each for each in every if each.way.startswith(mechanism)), every[0])
    return round((same.timed or 0) / same.sent)


def figures(rows: list[Row]) -> list[Figure]:
    """Those that a budget is for, of one walk."""
    found = [
        Figure(
            f"{row.plane}: {row.way}", above(rows, row) / walks(row, rows), "instructions", BUDGETS[row.way]
        )
        for row in rows
        if row.way in BUDGETS
    ]
    return [*found, *differences(rows)]


def differences(rows: list[Row]) -> Iterator[Figure]:
    """How far the means of two mechanisms are apart over the same packets: by no more than what the two cost a walk."""
    for plane in dict.fromkeys(row.plane for row in rows):
        both = [row for row in rows if row.plane == plane and row.way in BUDGETS and row.mean is not None]
        if len(both) == len(BUDGETS):
            means = [row.mean or 0.0 for row in both]
            cost = sum(above(rows, row) / walks(row, rows) for row in both)
            # Twice a budget is what --check allows; here that is the whole cost.
            yield Figure(
                f"{plane}: mean samples apart, {' and '.join(row.way for row in both)}",
                max(means) - min(means),
                "instructions",
                cost / 2,
            )


def section(rows: list[Row], release: str) -> str:
    """The text of docs/overhead.md."""
    planes = list(dict.fromkeys(row.plane for row in rows))
    parts = [
        f"""\
## Instructions of a packet

Written by `make bench ARGS=--instructions`: Linux {release} in a test machine with one CPU whose clock counts guest
instructions (`tools/vm/run.py --icount`), 1,000 rules that do not match, loopback UDP. Sampled 1/64 is kptrace's default;
the tracer that users write by hand is a kprobe pair with a map of start times. `timed` and `lost` are of all packets sent
with that way attached. The mean sample is by the same clock: two mechanisms time the same packets in turn, and their
means may differ by what they cost themselves.
"""
    ]
    for plane in planes:
        mine = [row for row in rows if row.plane == plane]
        cells = []
        for row in mine:
            if row.way == NOTHING:
                cells.append(
                    ["no tracer: one send and its receipt", f"{row.instructions:,.0f}", "", "", "", "", ""]
                )
                continue
            more, per = above(rows, row), walks(row, rows)
            budget = f"<= {BUDGETS[row.way]:,.0f}" if row.way in BUDGETS else ""
            told = ["" if value is None else f"{value:,.0f}" for value in (row.timed, row.lost, row.mean)]
            cells.append(
                [
                    row.way,
                    f"+ {more:,.0f}",
                    f"{per:g}",
                    f"+ {more / per:,.0f}",
                    budget,
                    f"{row.sent:,}",
                    *told,
                ]
            )
        head = ["what", "a packet", "walks", "a walk", "budget", "sent", "timed", "lost", "mean sample"]
        cells = [[*row, *[""] * (len(head) - len(row))] for row in cells]
        parts.append(f"{plane}:\n\n{table(head, cells)}")
    return "\n".join(parts)
