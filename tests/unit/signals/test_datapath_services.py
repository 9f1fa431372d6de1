# SPDX-License-Identifier: Apache-2.0
"""Services of one data plane: its cells lie one after another, and its samples carry its name."""

from array import array

from kptrace.model.identity import Protocol, ServicePort
from kptrace.model.netfilter import DataPlane
from kptrace.signals.lookup_services import CELL_WORDS, ServiceTop, service_rows

PLANES = (DataPlane.CILIUM,)
PORTS = [ServicePort("shop", f"svc{n}", "http", Protocol.TCP) for n in range(4)]


def cells(counts: dict[int, int]) -> "array[int]":
    """Words with that many samples of each service number, of at most 512 ns."""
    words = array("Q", bytes(len(PORTS) * CELL_WORDS * 8))
    for number, count in counts.items():
        words[number * CELL_WORDS] = count
        words[number * CELL_WORDS + CELL_WORDS - 1] = 100 * count
    return words


def test_named_and_other_services_of_one_data_plane() -> None:
    """The busiest has a series of its own, the others are one; each sample is of cilium."""
    top, words = ServiceTop(1, planes=PLANES), cells({0: 5, 1: 7, 3: 2})
    top.update(words, len(PORTS), 0.0)
    shown = {sample.labels: sample.count for sample in top.samples(words, PORTS, "fentry")}
    assert shown == {
        ("fentry", "cilium", "shop", "svc1", "http", "TCP"): 7,
        ("fentry", "cilium", "~other", "~other", "~other", "~other"): 7,
    }
    assert top.named(PORTS) == [PORTS[1]]


def test_one_services_rows() -> None:
    """Its count and mean, under the data plane's name."""
    (row,) = service_rows(cells({2: 3}), PORTS, ("shop", "svc2"), PLANES)
    assert (row["dataplane"], row["count"], row["mean ns"]) == ("cilium", 3, 100)
