# SPDX-License-Identifier: Apache-2.0
"""Running the tools that an embedded node is built with, with errors that a user can act on."""

import subprocess
from collections.abc import Sequence

from kptrace.model.errors import PrivilegeError, UnsupportedError

#: Which Debian package has a tool.
PACKAGES = {"ip": "iproute2", "nft": "nftables", "conntrack": "conntrack"}
#: No single command on a node of 10,000 Services takes longer.
TIMEOUT_SECONDS = 120.0


def start(argv: Sequence[str], *, stdin: bool = False) -> "subprocess.Popen[str]":
    """Start a tool with captured output, out of reach of the terminal's Ctrl-C.

    Raises:
        UnsupportedError: the tool is not installed.
    """
    try:
        return subprocess.Popen(
            list(argv),
            stdin=subprocess.PIPE if stdin else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
    except FileNotFoundError as error:
        package = PACKAGES.get(argv[0], "iptables")
        raise UnsupportedError(f"{argv[0]} is not installed", remedy=f"apt-get install {package}") from error


def finish(process: "subprocess.Popen[str]", *, stdin: str | None = None) -> str:
    """Feed a started tool, wait for it and return what it printed; it is ended if the wait is interrupted.

    Raises:
        PrivilegeError: the tool was refused for want of privileges.
        UnsupportedError: the tool failed; the message has the first line it complained with.
    """
    try:
        out, err = process.communicate(stdin, timeout=TIMEOUT_SECONDS)
    except BaseException:
        process.kill()
        process.wait()
        raise
    if process.returncode == 0:
        return out
    args = process.args if isinstance(process.args, list) else [process.args]
    shown = " ".join(str(part) for part in args[:8])
    complaint = next(
        filter(None, map(str.strip, (err or out).splitlines())), f"exit code {process.returncode}"
    )
    if "not permitted" in complaint or "must be root" in complaint:
        raise PrivilegeError(f"{shown}: {complaint}", remedy="run as root")
    raise UnsupportedError(f"{shown}: {complaint}", remedy="see whether the kernel has what this tool needs")


def run(argv: Sequence[str], *, stdin: str | None = None) -> str:
    """Run a tool to its end and return what it printed. Raises what `start` and `finish` raise."""
    return finish(start(argv, stdin=stdin is not None), stdin=stdin)
