# SPDX-License-Identifier: Apache-2.0
"""tests/vm on one kernel: run inside, with pytest's results and the logs brought out."""

import shlex
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.vm import boot
from tools.vm.kernels import Installed
from tools.vm.matrix import Kernel
from tools.vm.process import Host

# kptrace is the installed one: only the tests and this harness are taken from the working tree. conftest.py of the
# tests above is about the machine that the harness runs on, so it is left out.  What passing tests print is in junit.xml.
_SCRIPT = """\
mkdir -p /run/suite/tests /run/suite/tools && cd /run/suite || exit
mount --bind /repo/tests tests && mount --bind /repo/tools tools && cp /repo/setup.cfg . || exit
export KPTRACE_VM_KERNEL={kernel}
exec /opt/kptrace/bin/python -m pytest tests/vm --confcutdir=tests/vm -p no:cacheprovider \\
    --durations=5 --durations-min=1 --junitxml=/out/junit.xml -o junit_logging=system-out {arguments}
"""
# pytest's exit code where -k leaves nothing.
_NO_TESTS = 5


@dataclass(frozen=True, slots=True)
class Options:
    """How the tests are run.

    Attributes:
        expression: which, as `pytest -k` takes it; empty: all.
        verbose: show pytest's output while it comes.
    """

    expression: str = ""
    verbose: bool = False


@dataclass(frozen=True, slots=True)
class Result:
    """What one kernel gave.

    Attributes:
        kernel: its name in the matrix.
        release: as `uname -r` says.
        boot_seconds, total_seconds: on the host's clock.
        passed, failed, skipped: tests; errors count as failed.
        trouble: why there are no results, or what failed, a line each.
    """

    kernel: str
    release: str = ""
    boot_seconds: float = 0.0
    total_seconds: float = 0.0
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    trouble: str = ""

    @property
    def good(self) -> bool:
        """Whether nothing failed; a run that gave no results has trouble."""
        return not self.trouble and self.failed == 0

    def line(self) -> str:
        """For people: one line, and what went wrong below it."""
        text = (
            f"{self.kernel:<14}{self.release:<24}boot {self.boot_seconds:5.1f} s  total {self.total_seconds:6.1f} s  "
            f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped"
        )
        return f"{text}\n{self.trouble}" if self.trouble else text


def summary(results: Sequence[Result]) -> str:
    """All kernels in one line; a kernel without results is a failure."""
    failed = sum(result.failed or not result.good for result in results)
    passed, skipped = (sum(getattr(result, name) for result in results) for name in ("passed", "skipped"))
    return f"{passed} passed, {failed} failed, {skipped} skipped"


def read_junit(path: Path) -> tuple[int, int, int, str]:
    """Passed, failed and skipped in a junit.xml, and a line for each failure."""
    passed = failed = skipped = 0
    lines = []
    for case in ET.parse(path).getroot().iter("testcase"):  # noqa: S314 - written by our own pytest
        bad = [child for child in case if child.tag in {"failure", "error"}]
        if bad:
            failed += 1
            message = (bad[0].get("message") or "").strip().splitlines() or [""]
            lines.append(f"  {case.get('name')}: {message[0][:160]}")
        elif case.find("skipped") is not None:
            skipped += 1
        else:
            passed += 1
    return passed, failed, skipped, "\n".join(lines)


def run(
    host: Host, kernel: Kernel, installed: Installed, out: Path, machine: boot.Machine, options: Options
) -> Result:
    """Boot the kernel, run the tests, read what they gave.

    Raises:
        VmError: the machine did not boot or hung.
    """
    junit = out / "junit.xml"
    junit.unlink(missing_ok=True)
    arguments = f"-k {shlex.quote(options.expression)}" if options.expression else ""
    script = _SCRIPT.format(kernel=shlex.quote(kernel.name), arguments=arguments)
    with (out / "pytest.log").open("w", encoding="utf-8", buffering=1) as log:

        def show(text: str) -> None:
            log.write(text)
            if options.verbose:
                print(text, end="", flush=True)

        outcome = boot.run_command(host, installed, out, script, machine, show)
    (out / "kernel.txt").write_text(f"{installed.release}\n", encoding="utf-8")
    figures = (installed.release, outcome.boot_seconds, outcome.total_seconds)
    if not junit.exists():
        return Result(
            kernel.name, *figures, trouble=f"  pytest ended with {outcome.status}; see {out / 'pytest.log'}"
        )
    passed, failed, skipped, trouble = read_junit(junit)
    if failed:
        trouble += f"\n  see {out / 'pytest.log'}"
    elif outcome.status and not (outcome.status == _NO_TESTS and options.expression):
        trouble = f"  pytest ended with {outcome.status}; see {out / 'pytest.log'}"
    return Result(kernel.name, *figures, passed, failed, skipped, trouble)
