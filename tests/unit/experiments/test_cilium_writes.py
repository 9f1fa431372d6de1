# SPDX-License-Identifier: Apache-2.0
"""The order in which an agent writes, and what is in the maps afterwards, whatever happened before."""

import struct
from collections.abc import Sequence
from dataclasses import replace
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kptrace.experiments.cilium_agent import from_json, to_json
from kptrace.experiments.cilium_entries import LOADBALANCER
from kptrace.experiments.cilium_layouts import CONTROLS, LAYOUTS, MapName, Version
from kptrace.experiments.cilium_writes import Phase, ServiceTable, Write
from kptrace.experiments.services import make_services
from kptrace.model.identity import Endpoint, Protocol, ServiceAddress
from kptrace.model.netfilter import IpFamily

ONE = ServiceAddress("10.96.1.1", 80, Protocol.TCP)
OTHER = ServiceAddress("10.96.1.2", 443, Protocol.TCP)
POOL = tuple(Endpoint(f"10.244.0.{number}", 8080) for number in range(1, 8))
Contents = dict[tuple[MapName, bytes], bytes]


def table(version: Version) -> ServiceTable:
    """An agent's, with empty maps."""
    sizes = {name: spec.value_size for name, spec in LAYOUTS[version].items()}
    return ServiceTable(CONTROLS[version], sizes)


def phases(writes: Sequence[Write]) -> list[str]:
    """Each write's phase, a deletion's with a minus before it."""
    return [("" if write.value is not None else "-") + write.phase.name.lower() for write in writes]


def apply(contents: Contents, writes: Sequence[Write]) -> None:
    """What the kernel does."""
    for write in writes:
        if write.value is None:
            contents.pop((write.map, write.key), None)
        else:
            contents[write.map, write.key] = write.value


def endpoints(contents: Contents, address: ServiceAddress, *, protocol: bool) -> list[tuple[str, int]] | None:
    """Where the programs may send a connection to this address, by slots; None if it is not there."""

    def entry(slot: int) -> tuple[int, int, int] | None:
        key = ip_address(address.ip).packed + struct.pack(
            ">H2sBB2x", address.port, slot.to_bytes(2, "little"), 6 if protocol else 0, 0
        )
        value = contents.get((MapName.SERVICES4, key))
        if value is None:
            return None
        backend, count, service, *_ = struct.unpack("<IH2sBBH", value)
        return backend, count, int.from_bytes(service, "big")

    master = entry(0)
    if master is None:
        return None
    found = []
    for slot in range(1, master[1] + 1):
        one = entry(slot)
        assert one is not None
        value = contents[MapName.BACKENDS4, struct.pack("<I", one[0])]
        found.append((str(ip_address(value[:4])), int.from_bytes(value[4:6], "big")))
        assert one[2] == master[2]
    return found


def test_the_newer_control_plane_deletes_orphans_first() -> None:
    """From two back ends to two others: the order of the reconciler, with its deletions of what is not there."""
    made = table(Version.CURRENT)
    made.update(ONE, POOL[:2])
    assert phases(made.update(ONE, POOL[1:3])) == [
        *("-orphan", "-affinity"),
        *("slot", "-affinity"),
        *("backend", "slot", "-affinity"),
        *("reverse", "master"),
    ]
    assert phases(made.update(ONE, POOL[:0])) == [
        *("-orphan", "-affinity", "-orphan", "-affinity"),
        *("reverse", "master", "-surplus", "-surplus"),
    ]


def test_the_legacy_control_plane_deletes_unused_back_ends_last() -> None:
    """The same: new back ends, all slots, the Service's own entry, and only then what is not used any more."""
    made = table(Version.OLDER)
    made.update(ONE, POOL[:2])
    assert phases(made.update(ONE, POOL[1:4])) == [
        *("backend", "backend", "slot", "slot", "slot"),
        *("reverse", "master", "-unused"),
    ]
    assert phases(made.update(ONE, POOL[1:2]))[-3:] == ["-surplus", "-unused", "-unused"]


def test_a_service_is_deleted_from_its_own_entry_on() -> None:
    """Slot 0 goes before the others."""
    for version, expected in (
        (Version.CURRENT, ["-orphan", "-affinity", "-master", "-surplus", "-unused"]),
        (Version.OLDER, ["-master", "-surplus", "-unused", "-unused"]),
    ):
        made = table(version)
        made.update(ONE, POOL[:1])
        assert phases(made.remove(ONE)) == expected


def test_a_shared_back_end_is_written_once_and_deleted_last() -> None:
    """Two addresses with one back end: its entry is written with the first and deleted with the last."""
    made = table(Version.CURRENT)
    assert "backend" in phases(made.update(ONE, POOL[:1]))
    assert "backend" not in phases(made.update(OTHER, POOL[:1]))
    assert "-orphan" not in phases(made.remove(ONE))
    assert "-orphan" in phases(made.remove(OTHER))


def test_terminating_back_ends_are_inactive_slots_while_there_are_others() -> None:
    """They come behind the active ones, or are all that there is; their state is written anew."""
    made = table(Version.CURRENT)
    leaving = POOL[0]._replace(ready=False, terminating=True)
    made.update(ONE, POOL[:2])
    writes = made.update(ONE, [leaving, POOL[1]])
    master = next(write for write in writes if write.phase is Phase.MASTER)
    assert struct.unpack("<4xH4xH", master.value or b"") == (1, 1)
    (changed,) = [write for write in writes if write.phase is Phase.BACKEND]
    assert (changed.value or b"")[7] == 1
    master = next(write for write in made.update(ONE, [leaving]) if write.phase is Phase.MASTER)
    assert struct.unpack("<4xH4xH", master.value or b"") == (1, 0)


def test_flags_are_those_that_were_asked_for() -> None:
    """A load balancer's address has its flag in the Service's own entry."""
    writes = table(Version.CURRENT).update(ONE, POOL[:1], flags=LOADBALANCER)
    (master,) = [write for write in writes if write.phase is Phase.MASTER]
    assert (master.value or b"")[8] == LOADBALANCER


CHANGES = st.lists(
    st.tuples(st.sampled_from([ONE, OTHER]), st.one_of(st.none(), st.sets(st.sampled_from(POOL)))),
    max_size=12,
)


@pytest.mark.parametrize("version", Version)
@given(changes=CHANGES)
def test_the_maps_lead_to_what_was_asked_for_last(
    version: Version, changes: list[tuple[ServiceAddress, set[Endpoint] | None]]
) -> None:
    """After any changes, written one by one or by phases; when all is removed, nothing is left."""
    made, contents, by_phase = table(version), Contents(), Contents()
    wanted: dict[ServiceAddress, set[Endpoint]] = {}
    protocol = CONTROLS[version].protocol_in_keys
    for address, asked in changes:
        if asked is None and address not in wanted:
            continue
        if asked is None:
            del wanted[address]
            writes = made.remove(address)
        else:
            wanted[address] = asked
            writes = made.update(address, sorted(asked))
        apply(contents, writes)
        apply(by_phase, sorted(writes, key=lambda write: write.phase))
        assert contents == by_phase
        for each in (ONE, OTHER):
            found = endpoints(contents, each, protocol=protocol)
            expected = None if each not in wanted else sorted((e.ip, e.port) for e in wanted[each])
            assert (found if found is None else sorted(found)) == expected
    for address in wanted:
        apply(contents, made.remove(address))
    assert contents == {}


def test_a_service_survives_the_way_to_the_agent() -> None:
    """All that is written of it, in both families."""
    for family in IpFamily:
        (service,) = make_services(1, 2, family=family, external_every=1)
        changed = replace(
            service, endpoints=tuple(e._replace(node="", terminating=True) for e in service.endpoints)
        )
        assert from_json(to_json(changed)) == changed
