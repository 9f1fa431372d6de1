# SPDX-License-Identifier: Apache-2.0
"""What each kernel is promised to do, and docs/support.md that says so. Pure; the tables are handed in.

They are `kptrace.kernel.features.TABLE` and `kptrace.signals.mechanisms.MECHANISMS`.
"""

import re
from collections.abc import Sequence
from typing import Protocol

from tools.vm.matrix import KERNELS, Kernel

_HEAD = """\
# Supported kernels

This page is made from `tools/vm/matrix.py` and kptrace's own tables of features and mechanisms: `make golden`.

`make test-vm` boots Debian's kernels on the root of the shipped image and holds kptrace to every promise below: a promised
mechanism that does not load fails the test. `make test-vm KERNEL=6.1` boots one. A kernel of another distribution does the
same if it has the same features; `kptrace check` says which yours has, and what it saw where one is missing.

Before 5.11 modules have no BTF, and the kernel's own has the legacy tables' structures but not those of nftables: look-ups by
kprobe are iptables-legacy's only there, and /status says so.

"""


class FeatureRow(Protocol):
    """What is read of `kptrace.kernel.features.Feature`."""

    @property
    def name(self) -> str:
        """Its stable name."""

    @property
    def since(self) -> str:
        """The first kernel that has it; empty where no version is meant."""

    @property
    def summary(self) -> str:
        """What it is."""


class MechanismRow(Protocol):
    """What is read of `kptrace.signals.mechanisms.Mechanism`."""

    @property
    def signal(self) -> str:
        """What it measures."""

    @property
    def name(self) -> str:
        """How."""

    @property
    def needs(self) -> Sequence[str]:
        """Names of features."""

    @property
    def built(self) -> bool:
        """Whether this version of kptrace has it."""


def version_of(release: str) -> tuple[int, int]:
    """The first two numbers of a kernel's release: (6, 12) of `6.12.107+deb13-amd64`."""
    match = re.match(r"(\d+)\.(\d+)", release)
    if match is None:
        raise ValueError(f"{release!r} is no kernel's release")
    return int(match[1]), int(match[2])


def promised_features(kernel: Kernel, release: str, table: Sequence[FeatureRow]) -> dict[str, bool]:
    """For each feature whether the kernel must have it."""
    version = version_of(release)
    return {
        row.name: row.name not in kernel.refuses and (not row.since or version_of(row.since) <= version)
        for row in table
    }


def promised_mechanisms(
    kernel: Kernel, release: str, table: Sequence[FeatureRow], mechanisms: Sequence[MechanismRow]
) -> list[tuple[str, str]]:
    """Signal and name of each mechanism that must work on the kernel, in the order of the table."""
    has = promised_features(kernel, release, table)
    return [
        (row.signal, row.name) for row in mechanisms if row.built and all(has[name] for name in row.needs)
    ]


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *body)) + "\n"


def page(
    table: Sequence[FeatureRow], mechanisms: Sequence[MechanismRow], kernels: Sequence[Kernel] = KERNELS
) -> str:
    """docs/support.md."""
    signals = list(dict.fromkeys(row.signal for row in mechanisms))
    rows = [["kernel", "from", "boot options", *signals, "refused there", "tested"]]
    for kernel in kernels:
        promised = promised_mechanisms(kernel, kernel.version, table, mechanisms)
        name = f"{kernel.name} ({kernel.version})" if kernel.name == "newest" else kernel.name
        origin = f"{kernel.release}, `{kernel.package}`"
        cells = [", ".join(way for signal, way in promised if signal == wanted) or "-" for wanted in signals]
        options = " ".join(f"`{option}`" for option in kernel.options) or "-"
        tested = "every change" if kernel.ci else "`make acceptance`"
        rows.append([name, origin, options, *cells, ", ".join(kernel.refuses) or "-", tested])
    needs = [["signal", "mechanism", "needs", "first kernel"]]
    since = {row.name: row.since for row in table}
    for way in mechanisms:
        if way.built:
            first = max((since[name] for name in way.needs if since[name]), key=version_of, default="-")
            needs.append([way.signal, way.name, ", ".join(way.needs), first])
    features = [
        ["feature", "first kernel", "what it is"],
        *([row.name, row.since or "-", row.summary] for row in table),
    ]
    return f"{_HEAD}{_table(rows)}\n## Mechanisms\n\n{_table(needs)}\n## Features\n\n{_table(features)}"
