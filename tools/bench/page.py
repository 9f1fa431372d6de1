# SPDX-License-Identifier: Apache-2.0
"""docs/overhead.md: sections between markers, each written by the part of the benchmark that measured it."""

import re
from collections.abc import Sequence
from pathlib import Path

TITLE = "# What kptrace costs\n\nWritten by `make bench`; every figure was measured by it.\n"
#: In this order; a section that was never measured is not there.
SECTIONS = ("native", "instructions", "identity")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def replaced(page: str, name: str, text: str) -> str:
    """The page with one section anew, all others and what follows the last one as they are. Pure."""
    found = {each: _section(page, each) for each in SECTIONS}
    found[name] = text.strip() + "\n"
    parts = [f"{_begin(each)}\n{body}{_end(each)}\n" for each, body in found.items() if body]
    rest = re.split(r"^<!-- \w+: end -->\n", page, flags=re.MULTILINE)
    return "\n".join([TITLE, *parts]) + (rest[-1] if len(rest) > 1 else "")


def write(path: Path, name: str, text: str) -> None:
    """Write one section of the page."""
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    path.write_text(replaced(before, name, text), encoding="utf-8")


def _begin(name: str) -> str:
    return f"<!-- {name}: begin -->"


def _end(name: str) -> str:
    return f"<!-- {name}: end -->"


def _section(page: str, name: str) -> str:
    found = re.search(
        rf"^{re.escape(_begin(name))}\n(.*?)^{re.escape(_end(name))}$", page, re.DOTALL | re.MULTILINE
    )
    return found[1] if found else ""
