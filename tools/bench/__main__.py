# SPDX-License-Identifier: Apache-2.0
"""`make bench`: what kptrace costs here, written to docs/overhead.md; `--check` fails above twice a budget.

`--instructions` measures in a test machine instead, `--identity` names at scale; each writes its own section only.
"""

import argparse
import logging
import os
import platform
import sys
import tempfile
from pathlib import Path

import page
import structlog
from commits import commits
from figures import ROOT, Figure, build
from instructions import instructions
from node import daemon
from packets import PACKETS, ROUNDS, packets

from kptrace.kernel.compile import Compiler
from kptrace.kernel.host import Host
from kptrace.signals.lookup_kernel import REQUEST

OVERHEAD = ROOT / "docs/overhead.md"


def main() -> int:
    """Measure, write, and with `--check` judge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail where a figure is above twice its budget")
    parser.add_argument(
        "--instructions", action="store_true", help="guest instructions of a packet, in a test machine"
    )
    parser.add_argument(
        "--identity", action="store_true", help="names at scale, on a real API server that it builds once"
    )
    options = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    # What an installation has: compiled modules.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    if options.identity:
        name, (text, figures) = "identity", names_at_scale()
    elif options.instructions:
        name, (text, figures) = "instructions", instructions()
    else:
        name, (text, figures) = "native", native()
    page.write(OVERHEAD, name, text)
    print(text)
    over = [figure for figure in figures if figure.budget is not None and figure.value > 2 * figure.budget]
    if options.check and over:
        print(f"above twice the budget: {', '.join(figure.what for figure in over)}", file=sys.stderr)
        return 1
    return 0


def names_at_scale() -> tuple[str, list[Figure]]:
    """What names cost in a large cluster, on the node and at the API server."""
    sys.path.append(str(ROOT))  # the API server is that of tests/cluster
    from identity import identity  # noqa: PLC0415 - as said

    return identity()


def native() -> tuple[str, list[Figure]]:
    """What it costs on this machine, in time and memory."""
    with tempfile.TemporaryDirectory(prefix="kptrace-bench-") as name:
        folder = Path(name)
        loops = build(folder, "loops")
        figures = packets(Compiler(Host().vmlinux_btf, None).build(REQUEST), loops)
        print("\n".join(figure.row() for figure in figures), flush=True)
        figures += daemon(loops, folder)
        figures += commits(folder)
    table = "\n".join(figure.row() for figure in figures)
    text = (
        f"Machine: Linux {platform.release()}, {platform.machine()}, {os.cpu_count()} CPUs. Packet costs are lower quartiles"
        f" of {ROUNDS} interleaved rounds of {PACKETS:,} packets on one CPU through one filter chain with a counter.\n\n"
        f"| what | measured | budget |\n| --- | --- | --- |\n{table}\n"
    )
    return text, figures


if __name__ == "__main__":
    sys.exit(main())
