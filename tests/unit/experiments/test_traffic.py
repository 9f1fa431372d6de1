# SPDX-License-Identifier: Apache-2.0

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kptrace.experiments.services import make_services
from kptrace.experiments.traffic import Sources, client_sources, spread, targets
from kptrace.model.errors import KptraceError
from kptrace.model.netfilter import IpFamily


def test_sources_are_never_used_twice() -> None:
    """Every connection has an address and port of its own, and the end of them is an error."""
    sources = Sources(["192.0.2.1", "192.0.2.2"])
    taken = [sources.take() for _ in range(100_000)]
    assert len(set(taken)) == 100_000
    with pytest.raises(KptraceError, match="used up"):
        sources.take()


@pytest.mark.parametrize("family", IpFamily)
def test_clients_have_a_million_sources(family: IpFamily) -> None:
    """The default range is large enough for any experiment."""
    sources = client_sources(family)
    assert len({sources.take() for _ in range(200_000)}) == 200_000


@given(st.integers(0, 10**7), st.integers(1, 64))
def test_a_flood_is_spread_without_loss(total: int, parts: int) -> None:
    """The parts add up to the whole and differ by one at most."""
    shares = list(spread(total, parts))
    assert sum(shares) == total
    assert len(shares) == parts
    assert max(shares) - min(shares) <= 1


def test_targets_are_repeatable() -> None:
    """The same seed chooses the same Services."""
    addresses = [service.address for service in make_services(50)]
    assert targets(addresses, 20, seed=3) == targets(addresses, 20, seed=3)
    assert len(targets(addresses, 499)) == 499
