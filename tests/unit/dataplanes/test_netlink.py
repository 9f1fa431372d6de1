# SPDX-License-Identifier: Apache-2.0
import errno
import os
import sys
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kptrace.dataplanes.nftables.netlink import (
    NLM_F_DUMP_INTR,
    NetlinkError,
    NftMessage,
    attributes,
    messages,
)
from kptrace.dataplanes.nftables.netlink_socket import NfnetlinkSocket
from tests.unit.dataplanes import wire

Answer = Callable[[int], list[bytes | int]]


class FakeSocket:
    """Answers the n-th request with what `answers[n]` makes of its sequence; numbers are errnos of recv."""

    def __init__(self, *answers: Answer) -> None:
        self.answers = list(answers)
        self.queue: list[bytes | int] = []
        self.requests: list[bytes] = []

    def send(self, data: bytes, /) -> int:
        """Queue the next answer."""
        self.requests.append(data)
        self.queue += self.answers.pop(0)(int.from_bytes(data[8:12], sys.byteorder))
        return len(data)

    def recv(self, size: int, /) -> bytes:
        """Give the next datagram, or time out."""
        item = self.queue.pop(0) if self.queue else errno.EAGAIN
        if isinstance(item, int):
            raise OSError(item, os.strerror(item))
        assert len(item) <= size
        return item

    def close(self) -> None:
        """Close."""


def table(sequence: int, flags: int = 0) -> bytes:
    """An object of a dump."""
    return wire.nft(0, wire.name(1, "t"), sequence=sequence, flags=flags)


def test_dump_joins_the_datagrams_of_a_multipart_answer() -> None:
    """All objects of all datagrams come, without the end mark."""
    fake = FakeSocket(lambda s: [table(s) + table(s), table(s), wire.done(s)])
    assert NfnetlinkSocket(fake).dump(NftMessage.GETTABLE) == [table(1)] * 3
    assert fake.requests[0] == wire.nft(1, family=0, flags=0x301)


@pytest.mark.parametrize(
    "bad",
    [
        lambda s: [table(s), table(s, NLM_F_DUMP_INTR), wire.done(s)],
        lambda s: [table(s), wire.done(s, flags=NLM_F_DUMP_INTR)],
        lambda s: [table(s), errno.ENOBUFS, table(s), wire.done(s)],
    ],
    ids=["object", "end", "lost"],
)
def test_an_interrupted_dump_is_repeated(bad: Answer) -> None:
    """What came of the interrupted one is thrown away."""
    fake = FakeSocket(bad, bad, lambda s: [table(s), wire.done(s)])
    assert NfnetlinkSocket(fake).dump(NftMessage.GETTABLE) == [table(3)]


def test_a_dump_that_never_is_consistent_ends_in_an_error() -> None:
    """Repeating is bounded."""
    fake = FakeSocket(*[lambda s: [wire.done(s, flags=NLM_F_DUMP_INTR)]] * 50)
    with pytest.raises(NetlinkError, match="interrupted") as caught:
        NfnetlinkSocket(fake).dump(NftMessage.GETCHAIN)
    assert caught.value.errno == errno.EINTR
    assert len(fake.requests) < 20


@pytest.mark.parametrize("kind", [2, 3], ids=["error", "done"])
def test_a_refused_dump_raises_with_the_kernels_errno(kind: int) -> None:
    """An NLMSG_ERROR, or an NLMSG_DONE with a negative code, is the kernel's refusal."""
    fake = FakeSocket(lambda s: [wire.done(s, -errno.EPERM, kind=kind)])
    with pytest.raises(NetlinkError, match="GETCHAIN: EPERM") as caught:
        NfnetlinkSocket(fake).dump(NftMessage.GETCHAIN)
    assert caught.value.errno == errno.EPERM


def test_answers_to_earlier_requests_are_skipped() -> None:
    """A datagram with another sequence number is none of this dump's."""
    fake = FakeSocket(lambda s: [table(s + 7), wire.done(s + 7), table(s), wire.done(s)])
    assert NfnetlinkSocket(fake).dump(NftMessage.GETTABLE) == [table(1)]


def test_no_answer_is_an_error() -> None:
    """A kernel that says nothing does not hang the daemon."""
    with pytest.raises(NetlinkError, match="no answer"):
        NfnetlinkSocket(FakeSocket(lambda _: [])).dump(NftMessage.GETTABLE)


def test_generation_is_read_from_the_answer() -> None:
    """GETGEN gives NFTA_GEN_ID, EPERM is raised."""
    fake = FakeSocket(
        lambda s: [wire.nft(15, wire.number(1, 77), wire.number(2, 4), wire.name(3, "asker"), sequence=s)],
        lambda s: [wire.done(s, -errno.EPERM, kind=2)],
    )
    nfnetlink = NfnetlinkSocket(fake)
    assert nfnetlink.generation() == 77
    with pytest.raises(NetlinkError, match="EPERM"):
        nfnetlink.generation()


def test_a_cut_message_raises_after_those_before_it() -> None:
    """Whole messages are yielded first."""
    whole = table(1)
    walk = messages(whole + whole[:-1])
    assert next(walk)[3:] == (0, len(whole))
    with pytest.raises(NetlinkError, match=f"byte {len(whole)}"):
        next(walk)


def test_a_message_without_length_raises() -> None:
    """A length of 0 would be an endless walk."""
    with pytest.raises(NetlinkError):
        list(messages(bytes(16)))


@given(st.binary(max_size=300))
def test_any_bytes_are_walked_within_their_bounds(data: bytes) -> None:
    """Messages and attributes lie inside the buffer, in order, and are bounded in number."""
    found = []
    try:
        for each in messages(data):
            found.append(each)
    except NetlinkError:
        pass
    position = 0
    for _, _, _, start, end in found:
        assert position <= start < end <= len(data)
        position = end
    position = 0
    for _, low, high in attributes(data, 0, len(data)):
        assert position < low <= high <= len(data)
        position = high
