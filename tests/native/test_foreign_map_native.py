# SPDX-License-Identifier: Apache-2.0
"""Reading maps of other owners: whole, within bounds, and while their owner writes."""

import itertools
import os
import struct
import threading

import pytest

from kptrace.kernel import foreign_map
from kptrace.kernel.attach_datapath import set_tail_call
from kptrace.kernel.foreign_map import ForeignMap
from kptrace.kernel.host import Host
from kptrace.kernel.maps import Map, MapSpec, MapType, split_per_cpu
from kptrace.kernel.objects import map_info, program_info
from tests.native.objects_bench import READABLE, bpftool, closing, filled_map, load

_CPUS = Host().possible_cpus()
_ENTRIES = 3001


@pytest.mark.parametrize("kind", READABLE)
def test_maps_are_read_whole(kind: MapType) -> None:
    """A pass gives each entry that was written, with all CPUs' values, and counting agrees."""
    with filled_map(kind, _ENTRIES, _CPUS) as (foreign, written, _):
        read = list(foreign.read(2 * _ENTRIES))
        assert dict(read) == written
        assert len(read) == foreign.count(2 * _ENTRIES) == _ENTRIES
        key = next(iter(written))
        assert foreign.lookup(key) == written[key]
        assert len(bpftool("map", "dump", "id", foreign.info.id)) == _ENTRIES


@pytest.mark.parametrize("kind", READABLE)
def test_maps_without_batches_are_read_whole(kind: MapType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entry by entry, as for a kernel without batches, the result is the same."""
    monkeypatch.setattr(
        foreign_map.Command, "MAP_LOOKUP_BATCH", 4096
    )  # the kernel knows no such command: EINVAL
    with filled_map(kind, _ENTRIES, _CPUS) as (foreign, written, _):
        assert dict(foreign.read(2 * _ENTRIES)) == written
        assert foreign.count(2 * _ENTRIES) == _ENTRIES


@pytest.mark.parametrize("at_most", [0, 1, 511, 512, 513, _ENTRIES - 1, _ENTRIES])
def test_no_more_is_read_than_asked_for(at_most: int) -> None:
    """The bound holds on both sides of a batch's end, for reading and for counting."""
    with filled_map(MapType.HASH, _ENTRIES, _CPUS) as (foreign, _, _):
        assert len(list(foreign.read(at_most))) == foreign.count(at_most) == at_most


@pytest.mark.parametrize("room", [1, 2, 3])
def test_a_bucket_larger_than_a_batch_is_read(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a bucket of a hash has more entries than a batch has room for, the room grows."""
    monkeypatch.setattr(foreign_map, "_BATCH_ENTRIES", room)
    with filled_map(MapType.HASH, _ENTRIES, _CPUS) as (foreign, written, _):
        assert dict(foreign.read(2 * _ENTRIES)) == written


def test_an_empty_map_and_a_missing_key_are_no_errors() -> None:
    """A map without entries gives none, and a key that is not there gives None."""
    owner = Map(MapSpec("kpt_empty", MapType.HASH, 4, 8, 16))
    foreign = ForeignMap(os.dup(owner.fd), map_info(owner.fd), _CPUS)
    assert list(foreign.read(10)) == []
    assert foreign.count(10) == 0
    assert foreign.lookup(bytes(4)) is None
    foreign.close()
    foreign.close()
    owner.close()


def test_a_map_of_programs_tells_their_ids() -> None:
    """A map of tail calls, which has no batches on any kernel, gives the ids of the programs in it."""
    owner = Map(MapSpec("kpt_calls", MapType.PROG_ARRAY, 4, 4, 64))
    target = load("kpt_tail")
    foreign = ForeignMap(os.dup(owner.fd), map_info(owner.fd), _CPUS)
    with closing(target):
        set_tail_call(owner.fd, 7, target)
        assert list(foreign.read(100)) == [(struct.pack("=I", 7), struct.pack("=I", program_info(target).id))]
    foreign.close()
    owner.close()


@pytest.mark.parametrize("kind", [MapType.HASH, MapType.LRU_HASH, MapType.LPM_TRIE])
def test_entries_that_stay_are_seen_while_others_come_and_go(kind: MapType) -> None:
    """A pass over a map whose owner writes and deletes other entries sees each entry that stays, and ends."""
    with filled_map(kind, _ENTRIES, _CPUS) as (foreign, written, owner):
        over = threading.Event()
        turns = itertools.count()

        def churn() -> None:
            while not over.is_set():
                n = (next(turns) // 2 % 64) + (1 << 20)
                key = struct.pack("=II", 32, n) if kind is MapType.LPM_TRIE else struct.pack("=I", n)
                if not owner.delete(key):
                    owner.update(key, bytes(12))

        writer = threading.Thread(target=churn)
        writer.start()
        try:
            for _ in range(30):
                read = dict(foreign.read(10 * _ENTRIES))
                assert read.items() >= written.items()
        finally:
            over.set()
            writer.join()
        assert next(turns) > 100


def test_values_of_all_cpus_are_parted() -> None:
    """Each CPU's value is cut from the entry without the padding."""
    with filled_map(MapType.PERCPU_HASH, 10, _CPUS) as (foreign, _, _):
        (_, value), *_ = foreign.read(1)
        parts = split_per_cpu(value, foreign.info.value_size)
        assert [struct.unpack("=III", part)[1] for part in parts] == list(range(_CPUS))
