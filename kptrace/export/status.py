# SPDX-License-Identifier: Apache-2.0
"""/status: what is measured how, and why not the rest, as JSON and as a page for people."""

import json
from collections.abc import Callable, Iterable, Mapping

from kptrace import __version__
from kptrace.export import page
from kptrace.model.signal import MechanismState


def as_json(document: object) -> bytes:
    """JSON values for programs, and for people who look at them."""
    return json.dumps(document, indent=2, default=str).encode() + b"\n"


class StatusPage:
    """Renders the states of all signals and further sections."""

    def __init__(
        self, states: Callable[[], Iterable[MechanismState]], sections: Callable[[], Mapping[str, object]]
    ) -> None:
        """Both are asked at each request.

        Args:
            states: of all sources.
            sections: JSON values by title. Whether names of services and pods may be in them is the caller's
                decision; a section `signals` stands in for the states.
        """
        self._states = states
        self._sections = sections

    def document(self) -> dict[str, object]:
        """The status as JSON values."""
        signals = [
            {
                "signal": each.signal,
                "mechanism": each.mechanism,
                "state": each.state.value,
                "reason": each.reason,
                "detail": each.detail,
            }
            for each in self._states()
        ]
        return {"version": __version__, "signals": signals, **self._sections()}

    def as_json(self) -> bytes:
        """The status for programs."""
        return as_json(self.document())

    def as_html(self) -> bytes:
        """The status for people."""
        return page.document("kptrace status", page.sections(self.document()))
