# SPDX-License-Identifier: Apache-2.0
"""What a benchmark gives: figures with their budgets; and what all of them need."""

import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


@dataclass(frozen=True)
class Figure:
    """One measured figure and its budget, both in `unit`."""

    what: str
    value: float
    unit: str
    budget: float | None = None

    def row(self) -> str:
        """A line of the table."""
        budget = "" if self.budget is None else f"<= {self.budget:g} {self.unit}"
        return f"| {self.what} | {self.value:.3g} {self.unit} | {budget} |"


def build(folder: Path, name: str) -> Path:
    """Compile one of the timed programs."""
    subprocess.run(["gcc", "-O2", "-o", str(folder / name), str(HERE / f"{name}.c")], check=True)
    return folder / name


def settle(pid: int) -> None:
    """Wait until a process has used no CPU for half a second: its start is over."""
    stat = Path(f"/proc/{pid}/stat")
    quiet_since, last = time.monotonic(), ""
    while time.monotonic() - quiet_since < 0.5:
        used = " ".join(stat.read_text().rpartition(")")[2].split()[11:13])
        if used != last:
            quiet_since, last = time.monotonic(), used
        time.sleep(0.05)
