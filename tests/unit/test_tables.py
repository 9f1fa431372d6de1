# SPDX-License-Identifier: Apache-2.0
"""Rows as text."""

from kptrace.cli.tables import rows_of


def test_columns_are_aligned_and_what_is_missing_is_empty() -> None:
    """Every key of any row is a column; lists of text are joined, others counted."""
    rows = [{"a": "x", "b": 1}, {"a": "long", "c": ["p", "q"]}, {"c": [{"k": 1}, {"k": 2}, {"k": 3}]}]
    assert rows_of(rows).splitlines() == ["a     b  c", "x     1", "long     p, q", "         3"]


def test_nothing_is_said_to_be_nothing() -> None:
    """An empty section does not look like a forgotten one."""
    assert rows_of([]) == "none"
