# SPDX-License-Identifier: Apache-2.0
"""Per-service series: bounded, monotonic, and no sample ever moves."""

from array import array

from hypothesis import given
from hypothesis import strategies as st

from kptrace.model.identity import Protocol, ServiceAddress, ServicePort
from kptrace.model.metrics import OTHER, HistogramSample
from kptrace.model.netfilter import IpFamily
from kptrace.signals.lookup_services import CELL_WORDS, PLANES, ServiceNumbers, ServiceTop, kernel_key

PORTS = [ServicePort("ns", f"svc{n}", "http", Protocol.TCP) for n in range(6)]


def words(counts: dict[int, int]) -> "array[int]":
    """Cells of the first data plane with `counts` samples by service number."""
    cells = array("Q", bytes(len(PORTS) * len(PLANES) * CELL_WORDS * 8))
    for number, count in counts.items():
        cells[number * len(PLANES) * CELL_WORDS] = count
    return cells


def shown(top: ServiceTop, cells: "array[int]") -> dict[str, int]:
    """Count by service name."""
    samples: list[HistogramSample] = list(top.samples(cells, PORTS, "bracket"))
    return {sample.labels[3]: sample.count for sample in samples}


def test_keys_are_in_network_order() -> None:
    """The kernel's key is address, port in network order, protocol, zeros."""
    assert kernel_key(ServiceAddress("10.96.0.1", 80, Protocol.TCP)) == (
        IpFamily.IPV4,
        bytes([10, 96, 0, 1, 0, 80, 6, 0]),
    )
    family, key = kernel_key(ServiceAddress("fd00::1", 53, Protocol.UDP))
    assert (family, len(key), key[16:19]) == (IpFamily.IPV6, 24, bytes([0, 53, 17]))


def test_a_service_keeps_its_number() -> None:
    """A Service that goes and comes back has the cells it had, and nobody else gets them."""
    numbers = ServiceNumbers()
    address = ServiceAddress("10.96.0.1", 80, Protocol.TCP)
    first = numbers.entries({address: PORTS[0]})
    numbers.entries({address: PORTS[1]})
    assert numbers.entries({address: PORTS[0]}) == first


def test_services_beyond_the_limit_are_counted() -> None:
    """What does not fit is refused and said."""
    numbers = ServiceNumbers(limit=2)
    services = {ServiceAddress(f"10.96.0.{n}", 80, Protocol.TCP): port for n, port in enumerate(PORTS)}
    assert len(numbers.entries(services)) == 2
    assert numbers.refused == len(PORTS) - 2


def test_the_busiest_are_named_and_the_rest_is_other() -> None:
    """With two names to give, the two busiest services get them."""
    top = ServiceTop(named=2)
    cells = words({0: 5, 1: 50, 2: 40, 3: 1})
    top.update(cells, len(PORTS), 0.0)
    assert shown(top, cells) == {"svc1": 50, "svc2": 40, OTHER: 6}


def test_a_name_is_held_and_a_sample_never_moves() -> None:
    """A newcomer waits until a name was held for its time; then its earlier samples stay in ~other."""
    top = ServiceTop(named=1, hold=100.0)
    top.update(words({0: 5}), len(PORTS), 0.0)
    cells = words({0: 5, 1: 1000})
    top.update(cells, len(PORTS), 50.0)
    assert shown(top, cells) == {"svc0": 5, OTHER: 1000}
    cells = words({0: 5, 1: 2000})
    top.update(cells, len(PORTS), 150.0)
    later = words({0: 5, 1: 2010})
    assert shown(top, later) == {"svc1": 10, OTHER: 2000}


@given(st.lists(st.lists(st.integers(0, 1000), min_size=6, max_size=6), max_size=12))
def test_other_never_falls(steps: list[list[int]]) -> None:
    """Whatever comes, ~other is a counter: it never goes back."""
    top = ServiceTop(named=2, hold=2.0)
    counts = [0] * 6
    before = 0
    for now, gains in enumerate(steps):
        counts = [a + b for a, b in zip(counts, gains, strict=True)]
        cells = words(dict(enumerate(counts)))
        top.update(cells, len(PORTS), float(now))
        after = shown(top, cells).get(OTHER, 0)
        assert after >= before
        before = after
