# SPDX-License-Identifier: Apache-2.0
"""Running the programs that the harness is built from: quietly, with their output only if they fail."""

import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from tools.vm.errors import VmError

REPOSITORY = Path(__file__).resolve().parents[2]


def cache_directory(environment: Mapping[str, str] = os.environ) -> Path:
    """Where downloads and disks are kept, outside git."""
    base = environment.get("XDG_CACHE_HOME") or Path(environment.get("HOME", "/root")) / ".cache"
    return Path(base) / "kptrace"


def run(argv: Sequence[str | Path], what: str, *, cwd: Path = REPOSITORY) -> str:
    """Run a program to its end and return what it printed.

    Raises:
        VmError: it is not there or failed; `what` says what was being done, and its last lines follow.
    """
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            cwd=cwd,
            check=False,
        )
    except OSError as error:
        raise VmError(f"{what}: cannot run {argv[0]}: {error.strerror}") from error
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()[-3:]
        raise VmError(f"{what}: {Path(argv[0]).name} ended with {done.returncode}: {' | '.join(lines)}")
    return done.stdout


@contextmanager
def locked(path: Path, busy: str = "") -> Iterator[None]:
    """Hold a lock file: two runs share the cache, and the folders that results come out to.

    Args:
        path: the lock file.
        busy: what to say if another run holds it; empty waits for that one.

    Raises:
        VmError: another run holds it.
    """
    with path.open("w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
        except BlockingIOError as error:
            raise VmError(busy) from error
        yield


def need(commands: Mapping[str, str]) -> None:
    """Install the Debian packages of commands that are missing; keys are commands, values their packages."""
    missing = sorted({package for command, package in commands.items() if shutil.which(command) is None})
    if not missing:
        return
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        raise VmError(f"missing packages: {' '.join(missing)}", remedy="run it once as root on Debian")
    print(f"vm: installing {' '.join(missing)}", flush=True)
    apt = ["env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "--option", "Acquire::Retries=3"]
    run([*apt, "update"], "the package lists")
    run(
        [
            *apt,
            "--option",
            "DPkg::Lock::Timeout=300",
            "install",
            "--yes",
            "--no-install-recommends",
            *missing,
        ],
        "installing packages",
    )
