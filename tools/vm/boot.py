# SPDX-License-Identifier: Apache-2.0
"""One test machine: how it is built, and one command in it."""

import re
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tools.vm.errors import VmError
from tools.vm.kernels import Installed
from tools.vm.process import Host
from tools.vm.shell import REPOSITORY, locked, run

_READY = "kptrace-vm-ready "
# Escape sequences and carriage returns of a serial console.
_UNPRINTABLE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b-\x1f]")
# A guest instruction is a nanosecond and nothing else is: figures repeat exactly.
_ICOUNT = "-icount shift=0,sleep=off"
# One thread of the host for all emulated CPUs. With one for each, a CPU may still meet a breakpoint that another one has
# just taken out of the kernel's text, and the kernel panics: one boot of five with 7.2 ("Oops: int3"). As fast for what
# runs here, and a second machine has the other core.
_ONE_THREAD = "-accel tcg,thread=single"


@dataclass(frozen=True, slots=True)
class Machine:
    """How a machine is built.

    Attributes:
        cpus: emulated ones.
        memory: as virtme-ng takes it.
        icount: deterministic: one CPU, one instruction a nanosecond.
        kvm: hardware virtualization instead of emulation.
        parallel: a thread of the host for each emulated CPU: they really run at the same time, at the risk of a panic.
        options: boot parameters.
        qemu_options: more arguments for QEMU, in one string.
        boot_seconds: longest time until the command starts.
        total_seconds: longest time altogether.
    """

    cpus: int = 2
    memory: str = "2G"
    icount: bool = False
    kvm: bool = False
    parallel: bool = False
    options: tuple[str, ...] = ()
    qemu_options: str = ""
    boot_seconds: float = 180.0
    total_seconds: float = 900.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a machine's run gave.

    Attributes:
        status: the command's exit code.
        boot_seconds: until the command started, on the host's clock.
        total_seconds: until the machine was gone.
    """

    status: int
    boot_seconds: float
    total_seconds: float


def install_vng(cache: Path) -> Path:
    """The folder of virtme-ng's commands, in an environment of its own; made if it is missing."""
    directory = cache / "virtme-ng"
    if not (directory / "bin" / "vng").exists():
        print("vm: installing virtme-ng", flush=True)
        run(["/usr/bin/python3", "-m", "venv", "--clear", directory], "an environment for virtme-ng")
        pip: list[str | Path] = [
            directory / "bin" / "python",
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
        ]
        # --root-disk is new in 1.42.
        run([*pip, "virtme-ng>=1.42,<2"], "installing virtme-ng")
    return directory / "bin"


def command_line(kernel: Installed, disk: Path, out: Path, machine: Machine) -> list[str]:
    """The arguments of vng. Pure."""
    argv = [
        "vng",
        "--run",
        str(kernel.image),
        "--root-disk",
        str(disk),
        "--root-fstype",
        "ext4",
        "--force-9p",
    ]
    argv += ["--disable-microvm", "--user", "root", "--verbose", "--memory", machine.memory]
    argv += ["--cpus", "1" if machine.icount else str(machine.cpus)]
    argv += [] if machine.kvm else ["--disable-kvm"]
    emulation = "" if machine.kvm or machine.parallel else _ONE_THREAD
    argv += [f"--rodir=/repo={REPOSITORY}", f"--rwdir=/out={out}"]
    argv += [f"--append={option}" for option in machine.options]
    argv += [
        f"--qemu-opts={option}"
        for option in (emulation, _ICOUNT * machine.icount, machine.qemu_options)
        if option
    ]
    return [*argv, "--", "bash /out/guest.sh"]


def _log(stream: IO[str], path: Path) -> None:
    # By lines: whoever waits for a machine wants to see how far it is.
    with path.open("w", encoding="utf-8", buffering=1) as log:
        for line in stream:
            log.write(_UNPRINTABLE.sub("", line))


def run_command(
    host: Host, kernel: Installed, out: Path, script: str, machine: Machine, show: Callable[[str], object]
) -> Outcome:
    """Boot, run a shell script inside, hand each piece of its output to `show`, and power off.

    Raises:
        VmError: the machine did not boot, or did not end by itself in time; or another one uses the folder.
    """
    with locked(out / "lock", f"another run has {out}"):
        shutil.copy(Path(__file__).with_name("guest.sh"), out)
        (out / "command.sh").write_text(script, encoding="utf-8")
        status, console = out / "status", out / "console.log"
        status.unlink(missing_ok=True)
        booted = 0.0
        with host.start(command_line(kernel, host.disk, out, machine), machine.total_seconds) as boot:
            logger = threading.Thread(target=_log, args=(boot.stderr, console), daemon=True)
            logger.start()
            boot_limit = boot.limit(machine.boot_seconds, "it did not boot")
            for line in boot.stdout:
                if booted:
                    show(line)
                elif line.startswith(_READY):
                    boot_limit.cancel()
                    booted = boot.seconds
                    boot.limit(machine.total_seconds, "its command did not end")
            boot.wait()
            logger.join()
            if boot.expired:
                raise VmError(f"{kernel.release}: {boot.expired}", remedy=f"see {console}")
            if not status.exists():
                raise VmError(
                    f"{kernel.release}: the machine ended before its command", remedy=f"see {console}"
                )
            return Outcome(int(status.read_text()), booted, boot.seconds)
