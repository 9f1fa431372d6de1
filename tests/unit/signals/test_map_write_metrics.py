# SPDX-License-Identifier: Apache-2.0
"""What is exported of map writes, beside the rewrites of rules."""

from errno import E2BIG, ENOENT

from kptrace.export.samples import Gathered
from kptrace.model.metrics import HistogramSample
from kptrace.model.netfilter import DataPlane
from kptrace.model.rewrite import Outcome, ProcessRun, Rewrite
from kptrace.signals.map_write_metrics import CALL, SPECS, MapWriteCounts
from kptrace.signals.map_write_records import Command, WatchedMap
from kptrace.signals.rewrite_labels import MAX_FOREIGN, TableNames
from kptrace.signals.rewrite_metrics import RewriteCounts
from tests.unit.signals.map_write_story import MAPS, write


def rewrite(plane: DataPlane, table: str = "lb4_services_v2") -> Rewrite:
    """A rewrite of a data plane."""
    return Rewrite(plane, "ipv4", table, "cilium-agent", ProcessRun(1), 0, 5_000_000, 24, Outcome.COMMITTED)


def test_calls_are_counted_by_map_operation_and_outcome() -> None:
    """Each call is in one histogram, with its own duration."""
    counts = MapWriteCounts()
    counts.add(write(0, 1_500), MAPS[1])
    counts.add(write(0, 2_500, result=-E2BIG), MAPS[1])
    counts.add(write(0, 4_000, command=Command.DELETE, result=-ENOENT), MAPS[2])
    counts.add(write(0, 4_000_000, command=Command.DELETE_BATCH), MAPS[2])
    found = {
        sample.labels: (sample.count, round(sample.sum * 1e9))
        for family in counts.families()
        if family.spec == CALL
        for sample in family.samples
        if isinstance(sample, HistogramSample)
    }
    assert found == {
        ("lb4_services_v2", "update", "committed"): (1, 1_500),
        ("lb4_services_v2", "update", "failed"): (1, 2_500),
        ("lb6_services_v2", "delete", "absent"): (1, 4_000),
        ("lb6_services_v2", "delete_batch", "committed"): (1, 4_000_000),
    }


def test_names_are_bounded() -> None:
    """However many maps are watched, only so many have a label of their own."""
    counts = MapWriteCounts()
    for number in range(3 * MAX_FOREIGN):
        counts.add(write(0, 1), WatchedMap(number, f"m{number}", "inet", 1, 4, 4))
    (calls,) = (family for family in counts.families() if family.spec == CALL)
    assert len(calls.samples) == MAX_FOREIGN + 1
    assert calls.samples[-1].labels[0] == "~other"


def test_it_shares_families_with_rewrites_of_rules() -> None:
    """Both sources fit one scrape, though the same program writes to both, and each is told apart by its data plane."""
    maps, rules = MapWriteCounts(), RewriteCounts(TableNames())
    maps.add_rewrite(rewrite(DataPlane.CILIUM))
    rules.add(rewrite(DataPlane.IPTABLES_NFT))
    gathered = Gathered()
    gathered.add(rules.families())
    gathered.add(maps.families())
    (durations,) = (
        family for family in gathered.families() if family.spec.name == "kptrace_rewrite_duration_seconds"
    )
    assert {sample.labels[0] for sample in durations.samples} == {"cilium", "iptables-nft"}
    assert {family.spec for family in maps.families()} == set(SPECS)
