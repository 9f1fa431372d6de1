# SPDX-License-Identifier: Apache-2.0
"""The test machines' root: a read-only disk made from the shipped image and what only tests need."""

from pathlib import Path

from tools.vm.shell import REPOSITORY, locked, run

# Bytes that a guest may never write: the disk is attached read-only. Room for ext4's own tables.
_SPARE_MIB = 200


def build(cache: Path, *, fresh: bool = True) -> Path:
    """The disk of the image as the working tree has it now; the same disk as before if nothing changed.

    Args:
        cache: where disks are kept.
        fresh: False takes the disk that is there, whatever the working tree says.

    Raises:
        VmError: the image cannot be built.
    """
    directory = cache / "disks"
    directory.mkdir(parents=True, exist_ok=True)
    with locked(directory / "lock"):
        if not fresh and (present := sorted(directory.glob("*.img"))):
            return present[-1]
        return _build(directory)


def _build(directory: Path) -> Path:
    print(run([REPOSITORY / "tools" / "image.sh"], "the image").strip(), flush=True)
    build_root = ["buildah", "bud", "--quiet", "--isolation", "chroot", "--layers", "--pull-never"]
    tag = "localhost/kptrace-vm:latest"
    before = _image_id(tag)
    run([*build_root, "--tag", tag, REPOSITORY / "tools" / "vm"], "the test machines' root")
    image_id = _image_id(tag)
    if before not in {"", image_id}:
        run(["buildah", "rmi", before], "the test machines' root of before")
    disk = directory / f"{image_id[:16]}.img"
    if not disk.exists():
        _write(tag, disk)
        for old in directory.glob("*.img"):
            if old != disk:
                # A machine that runs keeps the file that it has open.
                old.unlink()
    return disk


def _image_id(tag: str) -> str:
    """The image of a name; empty if there is none."""
    shown = run(["buildah", "images", "--no-trunc", "--format", "{{.ID}} {{.Name}}:{{.Tag}}"], "the images")
    ids = [line.split()[0] for line in shown.splitlines() if line.endswith(f" {tag}")]
    return ids[0].rsplit(":", 1)[-1] if ids else ""


def _write(tag: str, disk: Path) -> None:
    container = run(["buildah", "from", "--pull-never", tag], "the test machines' root").strip()
    try:
        root = run(["buildah", "mount", container], "the test machines' root").strip()
        size = int(run(["du", "-sxm", root], "the test machines' root").split()[0]) + _SPARE_MIB
        new = disk.with_suffix(".new")
        new.unlink(missing_ok=True)
        # No journal: nothing is ever written. Sparse, so the spare room costs nothing.
        run(
            ["mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-d", root, new, f"{size}M"],
            "the test machines' disk",
        )
        new.rename(disk)
    finally:
        run(["buildah", "rm", container], "the test machines' root")
