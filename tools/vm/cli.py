# SPDX-License-Identifier: Apache-2.0
"""The command: tests on kernels, or one command on one kernel. Only here: printing results, exit codes."""

import argparse
import contextlib
import os
import platform
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from tools.vm import boot, disk, kernels, suite
from tools.vm.errors import VmError
from tools.vm.kernels import Installed
from tools.vm.matrix import KERNELS, Kernel, select
from tools.vm.process import Host
from tools.vm.shell import REPOSITORY, cache_directory, need
from tools.vm.support import version_of

_COMMANDS = {"qemu-system-x86_64": "qemu-system-x86", "depmod": "kmod"}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tools/vm/run.py",
        description="Boot Debian's kernels on the image's root and run tests/vm there, or one command.",
        epilog="tools/vm/run.py 6.12 -- kptrace check    (inside: /repo is the working tree, /out comes back)",
    )
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help="default: those of CI; see --list")
    parser.add_argument("--all", action="store_true", help="every supported kernel")
    parser.add_argument("--list", action="store_true", help="show the kernels and end")
    parser.add_argument("--cpus", type=int, default=2, help="emulated CPUs (default 2)")
    parser.add_argument("--memory", default="2G", help="default 2G")
    parser.add_argument(
        "--icount", action="store_true", help="one CPU, one instruction a nanosecond: repeatable"
    )
    parser.add_argument("--kvm", action="store_true", help="hardware virtualization instead of emulation")
    parser.add_argument(
        "--parallel-cpus", action="store_true", help="emulated CPUs run at the same time; may panic"
    )
    parser.add_argument(
        "--append", action="append", default=[], metavar="OPTION", help="another boot parameter"
    )
    parser.add_argument("--qemu-opts", default="", metavar="STRING", help="more arguments for QEMU")
    parser.add_argument(
        "--time-limit", type=float, default=1500.0, metavar="SECONDS", help="a kernel (default 1500)"
    )
    parser.add_argument("--update", action="store_true", help="look for newer kernels on the mirror")
    parser.add_argument(
        "--keep-disk", action="store_true", help="take the disk of the last run, build no image"
    )
    parser.add_argument("-k", dest="expression", default="", metavar="EXPRESSION", help="as pytest takes it")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="machines at a time (default: cores)"
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="show pytest's output")
    return parser


def _split(argv: Sequence[str]) -> tuple[list[str], list[str] | None]:
    """Our own arguments, and the command behind `--` if there is one."""
    if "--" not in argv:
        return list(argv), None
    cut = list(argv).index("--")
    return list(argv[:cut]), list(argv[cut + 1 :])


@contextmanager
def _timed(what: str) -> Iterator[None]:
    """Say how long it took: a new machine has to be done with everything within CI's limit."""
    begin = time.monotonic()
    yield
    print(f"vm: {what}: {time.monotonic() - begin:.0f} s", flush=True)


def script_of(command: Sequence[str]) -> str:
    """A shell script: one word is taken as it is, so that a quoted line may have pipes."""
    return command[0] if len(command) == 1 else shlex.join(command)


def _machine(arguments: argparse.Namespace, kernel: Kernel) -> boot.Machine:
    return boot.Machine(
        cpus=arguments.cpus,
        memory=arguments.memory,
        icount=arguments.icount,
        kvm=arguments.kvm,
        parallel=arguments.parallel_cpus,
        options=(*kernel.options, *arguments.append),
        qemu_options=arguments.qemu_opts,
        boot_seconds=min(180.0, arguments.time_limit),
        total_seconds=arguments.time_limit,
    )


def _out(kernel: Kernel) -> Path:
    directory = REPOSITORY / "build" / "vm" / kernel.name
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def _prepare(arguments: argparse.Namespace, cache: Path) -> Host:
    """Everything that machines need but their kernels."""
    if os.geteuid() != 0:
        raise VmError("must be root, as the image is built and its files are read as they are")
    if platform.machine() != "x86_64":
        raise VmError(f"the test machines are x86-64, this is {platform.machine()}")
    need(_COMMANDS)
    # virtme-ng takes a static one from here, which may be out of PATH.
    need({} if Path("/bin/busybox").exists() else {"busybox": "busybox-static"})
    tools = boot.install_vng(cache)
    with _timed("the image and its disk"):
        return Host(disk.build(cache, fresh=not arguments.keep_disk), tools)


def _test(arguments: argparse.Namespace, chosen: Sequence[Kernel], host: Host, cache: Path) -> int:
    """The tests on each kernel, several at a time; a kernel that cannot be had is a failure, and the others go on."""
    options = suite.Options(arguments.expression, arguments.verbose)
    results: list[suite.Result] = []

    def done(result: suite.Result) -> None:
        results.append(result)
        print(result.line(), flush=True)

    def one(kernel: Kernel, installed: Installed) -> None:
        try:
            done(suite.run(host, kernel, installed, _out(kernel), _machine(arguments, kernel), options))
        except VmError as error:
            if not host.closed:
                done(suite.Result(kernel.name, installed.release, trouble=f"  {error}"))

    with ThreadPoolExecutor(arguments.jobs) as pool:
        try:
            futures = []
            # The newest first: they do the most tests, and one that is left for the end has the other core idle.
            for kernel in reversed(chosen):
                # Here and not in a worker: kernels that differ in boot options only share their files.
                try:
                    futures.append(pool.submit(one, kernel, _install(arguments, kernel, cache)))
                except VmError as error:
                    done(suite.Result(kernel.name, trouble=f"  {error}"))
            for future in futures:
                future.result()
        except BaseException:
            host.close()
            raise
    print(suite.summary(results), flush=True)
    return 0 if all(result.good for result in results) and any(result.passed for result in results) else 1


def _install(arguments: argparse.Namespace, kernel: Kernel, cache: Path) -> Installed:
    with _timed(f"the kernel {kernel.name}"):
        installed = kernels.install(kernel, cache, update=arguments.update)
    if version_of(installed.release) != version_of(kernel.version):
        print(
            f"vm: {kernel.name} is {installed.release}; tools/vm/matrix.py still says {kernel.version}",
            flush=True,
        )
    return installed


def main(argv: Sequence[str] | None = None) -> int:
    """Run, and turn every expected failure into one line."""
    own, command = _split(sys.argv[1:] if argv is None else argv)
    arguments = _parser().parse_args(own)

    def end(number: int, _frame: FrameType | None) -> None:
        sys.exit(128 + number)

    # So that the machine is ended on the way out.
    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGHUP, end)
    try:
        if arguments.list:
            for kernel in KERNELS:
                where = "CI" if kernel.ci else "acceptance"
                print(f"{kernel.name:<16}{kernel.release:<22}{where:<12}{' '.join(kernel.options)}".rstrip())
            return 0
        chosen = select(arguments.kernels, everything=arguments.all)
        if command is not None and (len(chosen) != 1 or not command):
            raise VmError(
                "a command needs one kernel", remedy="tools/vm/run.py KERNEL -- COMMAND", usage=True
            )
        cache = cache_directory()
        with _timed("all that machines need but kernels"):
            host = _prepare(arguments, cache)
        if command is None:
            with _timed("kernels and tests"):
                return _test(arguments, chosen, host, cache)
        kernel = chosen[0]
        installed, machine = _install(arguments, kernel, cache), _machine(arguments, kernel)
        return boot.run_command(
            host, installed, _out(kernel), script_of(command), machine, sys.stdout.write
        ).status
    except VmError as error:
        print(f"vm: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):
            print("vm: interrupted", file=sys.stderr)
        return 130
