# SPDX-License-Identifier: Apache-2.0
"""Kernels on disk: downloaded once, unpacked into folders that virtme-ng boots from."""

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tools.vm.errors import VmError
from tools.vm.matrix import Kernel
from tools.vm.mirror import Suite
from tools.vm.shell import run

# Drivers of hardware that no test machine has: half of the files, none of them ever loaded.
_LEFT_OUT = (
    "sound",
    *(f"drivers/{name}" for name in ("gpu", "media", "staging", "infiniband", "scsi", "iio", "usb")),
)


@dataclass(frozen=True, slots=True)
class Installed:
    """An unpacked kernel.

    Attributes:
        release: as `uname -r` says.
        image: what boots; the modules are in the same folder, as virtme-ng wants it.
    """

    release: str
    image: Path


def _key(kernel: Kernel) -> str:
    """Kernels that differ in boot options only share their files."""
    return f"{kernel.suite}-{kernel.package}"


def find(kernel: Kernel, cache: Path) -> Installed | None:
    """The kernel as it was unpacked before, if it was."""
    modules = cache / "kernels" / _key(kernel) / "lib" / "modules"
    releases = sorted(modules.iterdir()) if modules.is_dir() else []
    return Installed(releases[0].name, releases[0] / "vmlinuz") if releases else None


def install(kernel: Kernel, cache: Path, *, update: bool = False) -> Installed:
    """Make sure that the kernel is there; only the first time, and for an update, is anything downloaded.

    Raises:
        VmError: the mirror cannot be reached, or has something that is no kernel.
    """
    found = find(kernel, cache)
    if found and not update:
        return found
    suite = Suite(kernel.suite, cache)
    suite.update()
    packages = suite.kernel_packages(kernel.package)
    target = cache / "kernels" / _key(kernel)
    if found and any(found.release in package for package in packages):
        return found
    print(f"vm: {kernel.name}: downloading {' '.join(packages)}", flush=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="new-", dir=target.parent) as directory:
        new = Path(directory)
        suite.download(packages, new)
        _unpack(new)
        if target.exists():
            shutil.rmtree(target)
        # Last, in one step: an interrupted run leaves no half kernel behind.
        (new / "root").rename(target)
    installed = find(kernel, cache)
    if installed is None:
        raise VmError(f"{' '.join(packages)} have no kernel")
    return installed


def _unpack(directory: Path) -> None:
    """From packages to root/lib/modules/RELEASE with vmlinuz in it, whatever the release of Debian."""
    raw, root = directory / "raw", directory / "root"
    for package in sorted(directory.glob("*.deb")):
        run(["dpkg-deb", "--extract", package, raw], "unpacking a kernel")
        package.unlink()
    modules = next((path for path in (raw / "usr/lib/modules", raw / "lib/modules") if path.is_dir()), None)
    if modules is None:
        raise VmError("the kernel's packages have no modules")
    for release in modules.iterdir():
        for name in _LEFT_OUT:
            shutil.rmtree(release / "kernel" / name, ignore_errors=True)
        for link in ("build", "source"):
            (release / link).unlink(missing_ok=True)
        image = raw / "boot" / f"vmlinuz-{release.name}"
        if image.exists():
            image.rename(release / "vmlinuz")
        if not (release / "vmlinuz").exists():
            raise VmError(f"the kernel's packages have no vmlinuz for {release.name}")
    (root / "lib").mkdir(parents=True)
    modules.rename(root / "lib" / "modules")
    for release in (root / "lib" / "modules").iterdir():
        run(["depmod", "--basedir", root, release.name], "depmod")
