# SPDX-License-Identifier: Apache-2.0
"""The system calls by which kube-proxy's tools commit, as strace saw them: the oracle of commit stamps."""

import re
from dataclasses import dataclass
from pathlib import Path

_LINE = re.compile(r"^(\d+) +(\d+)\.(\d{9}) (.*)$")
#: A batch, or a legacy table's replacement.
_COMMIT = re.compile(r"sendmsg\(.*NFNL_MSG_BATCH_BEGIN|setsockopt\(.*(?:IPT|IP6T)_SO_SET_REPLACE")


@dataclass(frozen=True, slots=True)
class Committing:
    """One such call: who, and between which ns since 1970: its entry, and the entry of the process's next call."""

    tgid: int
    begin_ns: int
    end_ns: int


def trace_prefix(log: Path) -> tuple[str, ...]:
    """What to put before a command to have it and its children traced into a file.

    Their other system calls are not slowed, and the command's process stays the one that was started.
    """
    return (
        *("strace", "-D", "-f", "--seccomp-bpf", "--absolute-timestamps=format:unix,precision:ns"),
        *(
            "--quiet=all",
            "-A",
            "-s",
            "16",
            "-e",
            "trace=sendmsg,setsockopt,close,exit_group",
            "-e",
            "signal=none",
        ),
        *("-o", str(log), "--"),
    )


def committing(log: Path) -> list[Committing]:
    """The calls so far that were over, in the order of their ends."""
    found: list[Committing] = []
    begun: dict[int, int] = {}
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        match = _LINE.match(line)
        if match is None:
            continue
        tgid, at, text = int(match[1]), int(match[2]) * 10**9 + int(match[3]), match[4]
        if text.startswith("<... "):
            continue  # the end of a call whose beginning was told before, told when strace came to it
        if tgid in begun:
            found.append(Committing(tgid, begun.pop(tgid), at))
        if _COMMIT.match(text):
            begun[tgid] = at
    return sorted(found, key=lambda each: each.end_ns)
