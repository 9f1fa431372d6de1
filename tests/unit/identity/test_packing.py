# SPDX-License-Identifier: Apache-2.0
from hypothesis import given
from hypothesis import strategies as st

from kptrace.identity.packing import ByPort, pack, pack_endpoints, unpack
from kptrace.model.identity import Endpoint, Hints, Protocol

names = st.text(max_size=8)
hints = st.builds(Hints, st.lists(names, max_size=2).map(tuple), st.lists(names, max_size=2).map(tuple))
endpoints = st.builds(
    Endpoint, names, st.integers(0, 0xFFFF), names, names, st.booleans(), st.booleans(), st.booleans(), hints
)
by_port = st.lists(
    st.tuples(st.tuples(names, st.sampled_from(Protocol)), st.lists(endpoints, max_size=4).map(tuple)),
    max_size=4,
).map(tuple)


@given(by_port)
def test_what_is_packed_is_unpacked(found: ByPort) -> None:
    """Every field of every endpoint survives, in order, and equal endpoints are equal bytes."""
    data = pack_endpoints(found)
    assert unpack(data) == found
    assert pack_endpoints(unpack(data)) == data
    for key, _ in found:
        assert (key in data.ports) == any(ends for name, ends in found if name == key)


def test_ports_share_back_ends_and_bytes_do_not_depend_on_the_way() -> None:
    """Packing from an object and from endpoints gives the same, so a slice that did not change is equal."""
    ends = tuple((f"10.1.0.{n}", f"node-{n}", f"ns/web-{n}", 3, (), ()) for n in range(30))
    ports = ((("http", Protocol.TCP), 8080), (("dns", Protocol.UDP), 53))
    data = pack(ports, ends)
    assert [(key, {end.port for end in found}) for key, found in unpack(data)] == [
        (("http", Protocol.TCP), {8080}),
        (("dns", Protocol.UDP), {53}),
    ]
    assert pack_endpoints(unpack(data)) == data
    assert len(data.data) < 30 * 16
