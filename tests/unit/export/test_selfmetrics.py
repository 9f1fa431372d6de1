# SPDX-License-Identifier: Apache-2.0
"""What kptrace says of itself."""

import os
import time
from pathlib import Path

from kptrace.export.selfmetrics import SPECS, SelfMetrics
from kptrace.model.metrics import Sample
from kptrace.model.signal import MechanismState, State
from tests.unit.export.fakes import fake_proc


def read(source: SelfMetrics) -> dict[str, list[tuple[tuple[str, ...], float]]]:
    """The samples by metric."""
    return {
        family.spec.name: [(s.labels, s.value) for s in family.samples if isinstance(s, Sample)]
        for family in source.families()
    }


def test_each_mechanism_has_its_present_state() -> None:
    """One sample of value 1 a mechanism; another state is another label set, and the former one ends."""
    states = [MechanismState("lookup", "bracket", State.ACTIVE)]
    source = SelfMetrics(lambda: states, dict)
    assert read(source)["kptrace_signal_state"] == [(("lookup", "bracket", "active", "ok"), 1.0)]
    states[0] = MechanismState("lookup", "bracket", State.OFF, "namespace_ended", "anything")
    assert read(source)["kptrace_signal_state"] == [(("lookup", "bracket", "off", "namespace_ended"), 1.0)]


def test_losses_are_there_before_the_first() -> None:
    """A loss that has not happened is 0, so that its first increase is seen."""
    losses = {("rewrite", "ring_full"): 0}
    source = SelfMetrics(list, lambda: losses)
    assert read(source)["kptrace_events_lost_total"] == [(("rewrite", "ring_full"), 0.0)]
    losses["rewrite", "ring_full"] = 2
    assert read(source)["kptrace_events_lost_total"] == [(("rewrite", "ring_full"), 2.0)]


def test_the_process_is_read_from_procfs(tmp_path: Path) -> None:
    """CPU time, memory, descriptors and start come from the given root, whatever the process is called."""
    seen = read(SelfMetrics(list, dict, fake_proc(tmp_path)))
    ticks, size = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
    assert seen["process_cpu_seconds_total"] == [((), 200 / ticks)]
    assert seen["process_resident_memory_bytes"] == [((), 2560.0 * size)]
    assert seen["process_open_fds"] == [((), 7.0)]
    assert seen["process_start_time_seconds"] == [((), 1_700_000_000 + 12345 / ticks)]


def test_the_real_process_agrees_with_python() -> None:
    """This very process started before now and uses the CPU time that Python knows of."""
    before = sum(os.times()[:2])
    seen = read(SelfMetrics(list, dict))
    assert before - 0.02 <= seen["process_cpu_seconds_total"][0][1] <= sum(os.times()[:2]) + 0.02
    assert 0 <= time.time() - seen["process_start_time_seconds"][0][1] < 24 * 3600


def test_everything_is_described() -> None:
    """Every family that comes is one that was announced."""
    source = SelfMetrics(list, dict)
    assert {family.spec for family in source.families()} == set(source.describe()) == set(SPECS)
