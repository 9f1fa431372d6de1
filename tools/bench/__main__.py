# SPDX-License-Identifier: Apache-2.0
"""`make bench`: what kptrace costs here, written to docs/overhead.md; `--check` fails above twice a budget."""

import argparse
import logging
import os
import platform
import sys
import tempfile
from pathlib import Path

import structlog
from commits import commits
from figures import ROOT, build
from node import daemon
from packets import PACKETS, ROUNDS, packets

from kptrace.kernel.compile import Compiler
from kptrace.kernel.host import Host
from kptrace.signals.lookup_kernel import REQUEST


def main() -> int:
    """Measure, write, and with `--check` judge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail where a figure is above twice its budget")
    options = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    # What an installation has: compiled modules.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    with tempfile.TemporaryDirectory(prefix="kptrace-bench-") as name:
        folder = Path(name)
        loops = build(folder, "loops")
        figures = packets(Compiler(Host().vmlinux_btf, None).build(REQUEST), loops)
        print("\n".join(figure.row() for figure in figures), flush=True)
        figures += daemon(loops, folder)
        figures += commits(folder)
    table = "\n".join(figure.row() for figure in figures)
    (ROOT / "docs/overhead.md").write_text(
        "# What kptrace costs\n\nWritten by `make bench`; every figure was measured by it.\n\n"
        f"Machine: Linux {platform.release()}, {platform.machine()}, {os.cpu_count()} CPUs. Packet costs are lower quartiles"
        f" of {ROUNDS} interleaved rounds of {PACKETS:,} packets on one CPU through one filter chain with a counter.\n\n"
        f"| what | measured | budget |\n| --- | --- | --- |\n{table}\n",
        encoding="utf-8",
    )
    print(table)
    over = [figure for figure in figures if figure.budget is not None and figure.value > 2 * figure.budget]
    if options.check and over:
        print(f"above twice the budget: {', '.join(figure.what for figure in over)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
