# SPDX-License-Identifier: Apache-2.0
"""Rows as a table of text. Pure."""

import json
from collections.abc import Mapping, Sequence


def rows_of(rows: Sequence[Mapping[str, object]]) -> str:
    """A line for the names of the columns and one for each row; `none` where there are no rows."""
    if not rows:
        return "none"
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, *([_cell(row.get(column, "")) for column in columns] for row in rows)]
    widths = [max(len(line[index]) for line in lines) for index in range(len(columns))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _cell(value: object) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return ", ".join(value)
    if isinstance(value, list):
        return str(len(value))
    return json.dumps(value, ensure_ascii=False, default=str)
