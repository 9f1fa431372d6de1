# SPDX-License-Identifier: Apache-2.0
"""/status for programs and for people."""

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from kptrace.export import page
from kptrace.export.status import StatusPage
from kptrace.model.signal import MechanismState, State

HOSTILE = "<script>alert('x')</script>&\"><img src=x onerror=alert(1)>\udcff"
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


class Tags(HTMLParser):
    """Collects the tags of a page and checks that they close."""

    def __init__(self) -> None:
        """No tag yet."""
        super().__init__()
        self.seen: set[str] = set()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """See the base class."""
        self.seen.add(tag)
        self.attributes.update(name for name, _ in attrs)


def tags(html: bytes) -> Tags:
    """Parse a page."""
    parser = Tags()
    parser.feed(html.decode())
    parser.close()
    return parser


def status(detail: str = "seen", **sections: object) -> StatusPage:
    """A page of two mechanisms."""
    states = [
        MechanismState("lookup", "bracket", State.ACTIVE),
        MechanismState("lookup", "fentry", State.UNAVAILABLE, "no_btf", detail),
    ]
    return StatusPage(lambda: states, lambda: sections)


def test_programs_get_everything() -> None:
    """The JSON has the states and the sections as they were given."""
    got = json.loads(status(losses={"daemon/callback_failed": 0}, plan=[{"hook": "input"}]).as_json())
    assert got["signals"][1] == {
        "signal": "lookup",
        "mechanism": "fentry",
        "state": "unavailable",
        "reason": "no_btf",
        "detail": "seen",
    }
    assert got["losses"] == {"daemon/callback_failed": 0}
    assert got["plan"] == [{"hook": "input"}]


def test_people_get_tables(golden: Callable[[str, str], None]) -> None:
    """The page, literally."""
    shown = status(
        "no /sys/kernel/btf/vmlinux",
        version="1.2.3",
        losses={"daemon/callback_failed": 0},
        identity={},
        plan=[{"hook": "input", "chains": ["a", "b"]}, {"hook": "output", "priority": -100}],
        notes=["one", "two"],
        ready=True,
    )
    golden("status.html", shown.as_html().decode())


def test_a_hostile_detail_stays_text() -> None:
    """Whatever a detail, a section or its title holds, the page has the tags that we wrote and no others."""
    ours = tags(status(one=["x"], two={"a": 1}).as_html())
    html = status(HOSTILE, **{HOSTILE: [HOSTILE], "two": {HOSTILE: HOSTILE}}, plain=HOSTILE).as_html()
    theirs = tags(html)
    assert theirs.seen == ours.seen
    assert theirs.attributes == ours.attributes
    assert b"<script" not in html
    assert b"&lt;script&gt;" in html


@given(st.dictionaries(st.text(), JSON, max_size=4))
def test_any_value_makes_a_page(sections: dict[str, object]) -> None:
    """Every JSON value can be shown, and none makes a tag or an attribute of its own."""
    seen = tags(page.document("t", page.sections(sections)))
    assert seen.seen <= {"html", "meta", "title", "style", "h1", "h2", "table", "tr", "th", "td", "p"}
    assert seen.attributes <= {"lang", "charset", "class"}


def test_what_json_does_not_know_is_text() -> None:
    """A path among the sections is its text instead of an error."""
    shown = status(file=Path("/etc/kptrace"))
    assert json.loads(shown.as_json())["file"] == "/etc/kptrace"
    assert b"/etc/kptrace" in shown.as_html()


def test_the_page_loads_nothing() -> None:
    """No script, no image, no address, and only the style that the policy allows."""
    html = status().as_html().decode()
    assert not re.search(r"<(script|img|link|iframe)|https?://|src=|style=", html)
