# SPDX-License-Identifier: Apache-2.0
"""Which nodes measure programming latency, and how shares are written."""

from pathlib import Path

import pytest

from kptrace.daemon.settings import Settings, parse_budget, parse_share, programming_off
from kptrace.model.errors import UsageError


def test_the_share_of_nodes_is_kept_by_their_names() -> None:
    """About as many of 2,000 nodes as were asked for, the same ones each time, and those of a smaller share among them."""
    names = [f"node-{number}.example" for number in range(2000)]

    def chosen(share: float) -> set[str]:
        return {
            name for name in names if not programming_off(Settings(node_name=name, programming_nodes=share))
        }

    few, more = chosen(0.05), chosen(0.2)
    assert 60 < len(few) < 140
    assert 320 < len(more) < 480
    assert few < more
    assert few == chosen(0.05)
    assert chosen(1.0) == set(names)
    assert chosen(0.0) == set()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (Settings(programming_nodes=1.0, identity="none"), "--identity=none"),
        (Settings(programming_nodes=1.0, rewrites=False), "--no-rewrites"),
        (Settings(programming_nodes=1.0, identity_file=Path("x")), "--identity-file"),
        (Settings(programming_nodes=0.5), "no --node-name"),
        (Settings(programming_nodes=0.0, node_name="n"), "--programming-nodes=0%"),
        (Settings(programming_nodes=1.0), ""),
    ],
)
def test_why_a_node_does_not(settings: Settings, reason: str) -> None:
    """What cannot be followed is off, and says by which option."""
    found = programming_off(settings)
    assert (reason in found) if reason else found == ""


def test_shares_are_percentages_or_fractions() -> None:
    """Or off; anything else is refused with the option's name."""
    assert [parse_share(text) for text in ("5%", "0.05", "100%", "1", "off")] == [0.05, 0.05, 1.0, 1.0, 0.0]
    assert parse_budget("0.5%") == 0.005
    for text in ("many", "-1", "200%", "0", ""):
        with pytest.raises(UsageError, match="--programming-nodes"):
            parse_share(text)
