# SPDX-License-Identifier: Apache-2.0

import json
import math

from kptrace.experiments.demo_result import DemoResult, LookupRow, RewriteRow

RESULT = DemoResult(
    lookup=(
        LookupRow("nftables", 100, 499, 499, 1512.4, 3301.0),
        LookupRow("iptables-nft", 2000, 499, 499, 19_512.0, 45_000.0),
    ),
    rewrite=(RewriteRow("nftables", 100, 29, 29, 0.21234, 0.4, 203),),
    startup_seconds=0.98765,
    losses=0,
    metrics=("a 1",),
)


def test_json_has_exactly_the_documented_keys() -> None:
    """The JSON form is the one that scripts rely on."""
    assert json.loads(json.dumps(RESULT.as_json())) == {
        "lookup": [
            {
                "dataplane": "nftables",
                "services": 100,
                "sent": 499,
                "counted": 499,
                "p50_ns": 1512,
                "p99_ns": 3301,
            },
            {
                "dataplane": "iptables-nft",
                "services": 2000,
                "sent": 499,
                "counted": 499,
                "p50_ns": 19512,
                "p99_ns": 45000,
            },
        ],
        "rewrite": [
            {
                "dataplane": "nftables",
                "services": 100,
                "writes": 29,
                "p50_ms": 0.212,
                "p99_ms": 0.4,
                "objects": 203,
            }
        ],
        "startup_seconds": 0.988,
        "losses": 0,
    }


def test_the_table_has_a_line_for_each_cell() -> None:
    """People see the same figures, with units, aligned."""
    lines = RESULT.as_table().splitlines()
    assert len(lines) == 4
    assert "1.51 us" in lines[1]
    assert "212 us" in lines[1]
    assert "19.5 us" in lines[2]
    assert lines[3] == "slowest start 0.99 s, losses 0"


def test_a_quantile_of_nothing_is_null() -> None:
    """Where nothing was measured, the JSON stays valid and the table shows a dash."""
    row = LookupRow("nftables", 100, 3, 0, math.nan, math.nan)
    result = DemoResult((row,), (), 0.0, 0)
    assert json.loads(json.dumps(result.as_json(), allow_nan=False))["lookup"][0]["p50_ns"] is None
    assert " -" in result.as_table()
    assert not result.exact
    assert RESULT.exact
