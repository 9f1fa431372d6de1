# SPDX-License-Identifier: Apache-2.0
"""/status: what is measured how, and why not the rest, as JSON and as a page for people."""

import json
from collections.abc import Callable, Iterable, Mapping
from html import escape

from kptrace import __version__
from kptrace.model.signal import MechanismState

_STYLE = (
    "body{font:15px sans-serif;margin:2em}table{border-collapse:collapse}"
    "td,th{padding:.2em .8em;border:1px solid #ccc;text-align:left}"
)


class StatusPage:
    """Renders the states of all signals and further sections."""

    def __init__(
        self, states: Callable[[], Iterable[MechanismState]], sections: Callable[[], Mapping[str, object]]
    ) -> None:
        """Both are asked at each request; sections must be JSON values without names of services or pods."""
        self._states = states
        self._sections = sections

    def document(self) -> dict[str, object]:
        """The status as JSON values."""
        signals = [
            {
                "signal": s.signal,
                "mechanism": s.mechanism,
                "state": s.state.value,
                "reason": s.reason,
                "detail": s.detail,
            }
            for s in self._states()
        ]
        return {"version": __version__, "signals": signals, **self._sections()}

    def as_json(self) -> bytes:
        """The status for programs."""
        return json.dumps(self.document(), indent=2).encode()

    def as_html(self) -> bytes:
        """The status for people."""
        document = self.document()
        rows = ""
        for each in self._states():
            cells = (each.signal, each.mechanism, each.state.value, each.reason, each.detail)
            rows += "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
        rest = {key: value for key, value in document.items() if key != "signals"}
        return (
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>kptrace</title><style>{_STYLE}</style>'
            "<h1>kptrace</h1><table><tr><th>signal<th>mechanism<th>state<th>reason<th>detail</tr>"
            f"{rows}</table><pre>{escape(json.dumps(rest, indent=2))}</pre></html>"
        ).encode()
