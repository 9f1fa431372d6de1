# SPDX-License-Identifier: Apache-2.0
"""JSON values as a page for people: tables, no scripts, everything escaped. Pure."""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from html import escape

STYLE = (
    "body{font:15px/1.4 sans-serif;margin:2em;max-width:80em}table{border-collapse:collapse}"
    "td,th{padding:.2em .8em;border:1px solid #bbb;text-align:left;vertical-align:top}th{background:#eee}"
    ".active{background:#d4edda}.degraded{background:#fff3cd}.unavailable{background:#f8d7da}.off{color:#666}"
)
#: The one style that the Content-Security-Policy allows.
STYLE_SOURCE = "'sha256-" + base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode() + "'"
_STATES = ("active", "degraded", "unavailable", "off")


def document(title: str, body: str) -> bytes:
    """A whole page around a body that is HTML already."""
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f"<style>{STYLE}</style>\n<h1>{escape(title)}</h1>\n{body}</html>\n"
    ).encode("utf-8", "replace")


def sections(values: Mapping[str, object]) -> str:
    """Plain values in one table, then a headed table for each list and mapping."""
    plain = {key: value for key, value in values.items() if not isinstance(value, (Mapping, list, tuple))}
    parts = [_mapping(plain)] if plain else []
    for key, value in values.items():
        if key not in plain:
            parts.append(f"<h2>{escape(str(key))}</h2>\n{_value(value)}")
    return "".join(parts)


def links(targets: Mapping[str, str]) -> str:
    """A list of links, by text."""
    items = (f'<li><a href="{escape(to)}">{escape(text)}</a>\n' for text, to in targets.items())
    return f"<ul>\n{''.join(items)}</ul>\n"


def _value(value: object) -> str:
    if isinstance(value, Mapping):
        return _mapping(value)
    if isinstance(value, (list, tuple)) and value and all(isinstance(row, Mapping) for row in value):
        return _rows(value)
    if isinstance(value, (list, tuple)):
        return _rows([{"": each} for each in value]) if value else "<p>none</p>\n"
    return _cell(value)


def _mapping(value: Mapping[str, object]) -> str:
    if not value:
        return "<p>none</p>\n"
    rows = (f"<tr><th>{escape(str(key))}</th>{_cell(each)}</tr>\n" for key, each in value.items())
    return f"<table>\n{''.join(rows)}</table>\n"


def _rows(rows: Sequence[Mapping[str, object]]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    head = "".join(f"<th>{escape(str(column))}</th>" for column in columns)
    body = "".join(
        "<tr>" + "".join(_cell(row.get(column, "")) for column in columns) + "</tr>\n" for row in rows
    )
    return f"<table>\n<tr>{head}</tr>\n{body}</table>\n"


def _cell(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    mark = f' class="{text}"' if text in _STATES else ""
    return f"<td{mark}>{escape(text)}</td>"
