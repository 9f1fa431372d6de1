# SPDX-License-Identifier: Apache-2.0
"""Debian's archive as this machine reaches it: apt's own mirror, proxies and signatures, for suites of any release."""

import re
from collections.abc import Iterable
from pathlib import Path

from tools.vm.errors import VmError
from tools.vm.shell import run

_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_TARGET_FORMAT = "$(ORIGIN)|$(LABEL)|$(REPO_URI)"
# From 6.19 on a kernel is split: linux-image depends on linux-binary and linux-modules.
_PART = re.compile(r"\blinux-(?:image|binary|modules)-\d[^\s,(|]*")


def find_mirror(targets: str) -> str:
    """The Debian archive's address in the output of `apt-get indextargets`; empty if there is none."""
    for line in targets.splitlines():
        origin, label, address = line.split("|", 2)
        if (origin, label) == ("Debian", "Debian"):
            return address
    return ""


def kernel_parts(depends: str) -> set[str]:
    """The packages in a `Depends` field that a kernel is made of."""
    return set(_PART.findall(depends))


def _own_mirror() -> str:
    query = ["apt-get", "indextargets", "--format", _TARGET_FORMAT, "Created-By: Packages"]
    found = find_mirror(run(query, "apt's sources"))
    if not found:
        # Never updated: apt does not know yet whose archives its sources are.
        run(["apt-get", "update"], "the package lists")
        found = find_mirror(run(query, "apt's sources"))
    if not found:
        raise VmError(
            "this machine's apt sources name no mirror of Debian", remedy="add one to /etc/apt/sources.list.d"
        )
    return found


class Suite:
    """One suite of the archive, with package lists of its own beside the machine's."""

    def __init__(self, name: str, cache: Path) -> None:
        self._name = name
        root = cache / "apt" / name
        for directory in ("state/lists/partial", "cache/archives/partial"):
            (root / directory).mkdir(parents=True, exist_ok=True)
        (root / "status").touch()
        self._sources = root / "sources.list"
        settings = {
            "Dir::State": root / "state",
            "Dir::State::status": root / "status",
            "Dir::Cache": root / "cache",
            "Dir::Etc::SourceList": self._sources,
            "Dir::Etc::SourceParts": "/dev/null",
            "Dir::Etc::Preferences": "/dev/null",
            "Dir::Etc::PreferencesParts": "/dev/null",
            "APT::Architecture": "amd64",
            "APT::Architectures": "amd64",
            "APT::Sandbox::User": "root",
            "Acquire::Languages": "none",
            "Acquire::Retries": "3",
        }
        self._options = [f"--option={key}={value}" for key, value in settings.items()]

    def update(self) -> None:
        """Fetch the suite's package lists.

        Raises:
            VmError: the mirror cannot be reached, or does not have the suite.
        """
        signed = f" [signed-by={_KEYRING}]" if _KEYRING.exists() else ""
        self._sources.write_text(f"deb{signed} {_own_mirror()} {self._name} main\n", encoding="utf-8")
        # Without Error-Mode apt-get update succeeds with a warning when a server does not answer.
        run(
            ["apt-get", *self._options, "--option=APT::Update::Error-Mode=any", "update"],
            f"the package lists of {self._name}",
        )

    def kernel_packages(self, package: str) -> list[str]:
        """The packages with files that a kernel's package depends on, itself left out."""
        found: set[str] = set()
        unread = {package}
        while unread:
            parts = kernel_parts(self._depends(unread.pop()))
            unread |= parts - found
            found |= parts
        if not found:
            raise VmError(f"{self._name} has no kernel behind {package}")
        return sorted(found)

    def _depends(self, package: str) -> str:
        shown = run(
            ["apt-cache", *self._options, "show", "--no-all-versions", package], f"{package} of {self._name}"
        )
        return " ".join(line for line in shown.splitlines() if line.startswith(("Depends:", "Pre-Depends:")))

    def download(self, packages: Iterable[str], directory: Path) -> None:
        """Fetch packages into a directory, their hashes checked."""
        run(["apt-get", *self._options, "download", *packages], f"a kernel of {self._name}", cwd=directory)
