# SPDX-License-Identifier: Apache-2.0
import itertools
import json
import random
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from kptrace.identity.api import ApiError
from kptrace.identity.feed import Alive, Changed, Listed, Message, Rejected, Trouble
from kptrace.identity.records import Kind
from kptrace.identity.resources import Level, resources
from kptrace.identity.store import Gone
from kptrace.identity.watch import Backoff, Tools, keep_watching

(SERVICES,) = resources(Level.SERVICES)


def raw(name: str, version: str = "1", ip: str = "10.96.0.1") -> dict[str, Any]:
    """A Service as a list or an event has it."""
    metadata = {"name": name, "namespace": "ns", "resourceVersion": version}
    return {"metadata": metadata, "spec": {"clusterIP": ip, "ports": [{"port": 80}]}}


def listing(*items: Any, version: str = "100", more: str = "") -> bytes:
    """The body of a list."""
    return json.dumps({"metadata": {"resourceVersion": version, "continue": more}, "items": items}).encode()


def event(change: str, value: dict[str, Any]) -> bytes:
    """One line of a watch."""
    return json.dumps({"type": change, "object": value}).encode() + b"\n"


def error_event(code: int) -> bytes:
    """The line by which a watch fails."""
    return event("ERROR", {"kind": "Status", "code": code, "reason": "Because"})


class Answer:
    """A scripted response: chunks of bytes, of which the last may be an error."""

    def __init__(self, *parts: bytes | ApiError, status: int = 200, retry_after: float = 0.0) -> None:
        self.parts = parts
        self.status = status
        self.retry_after = retry_after
        self.closed = False

    def body(self) -> bytes:
        """All parts."""
        return b"".join(self.chunks())

    def chunks(self) -> Iterator[bytes]:
        """Part by part."""
        for part in self.parts:
            if isinstance(part, ApiError):
                raise part
            yield part

    def close(self) -> None:
        """Remember it."""
        self.closed = True


class Server:
    """Gives scripted answers in order, and ends the watch when there are no more.

    It refuses to begin a watch with all objects unless it is told otherwise.
    """

    def __init__(self, *answers: Answer | ApiError, initial_events: bool = False) -> None:
        self.initial_events = initial_events
        self.answers = list(answers)
        self.given: list[Answer] = []
        self.queries: list[dict[str, str]] = []
        self.pauses: list[float] = []
        self.now = 0.0

    def get(self, path: str, query: Mapping[str, str], *, read_timeout: float) -> Answer:
        """The next answer."""
        assert path == "/api/v1/services"
        assert read_timeout > 0
        if "sendInitialEvents" in query and not self.initial_events:
            return Answer(status=422)
        self.queries.append(dict(query))
        answer = self.answers.pop(0)
        if isinstance(answer, ApiError):
            raise answer
        self.given.append(answer)
        return answer

    def pause(self, seconds: float) -> bool:
        """Go on as long as there are answers; time passes only here."""
        self.pauses.append(seconds)
        self.now += seconds
        return bool(self.answers)

    def messages(self) -> list[Message]:
        """Everything that a watch says until the answers end; every response must have been closed by then."""
        tools = Tools(lambda: self.now, self.pause, random.Random(1))
        found = list(keep_watching(self, SERVICES, tools))
        assert all(answer.closed for answer in self.given)
        return found


def names(message: Message) -> list[str]:
    """What a list or change is about, with a minus before what is gone."""
    if isinstance(message, Listed):
        return [record.key[1] for record in message.records]
    assert isinstance(message, Changed)
    return [("-" if isinstance(found, Gone) else "") + found.key[1] for found in message.events]


def test_a_list_is_followed_by_a_watch_from_its_version() -> None:
    """The list comes from the server's cache by kube-proxy's selector; events arrive in the batches of the stream."""
    server = Server(
        Answer(listing(raw("a"), raw("b"))),
        Answer(
            event("ADDED", raw("c", "101")) + event("MODIFIED", raw("a", "102")),
            event("DELETED", raw("b", "103")),
            event("BOOKMARK", {"metadata": {"resourceVersion": "110"}}),
        ),
        Answer(),
    )
    first, accepted, two, one, bookmark, again = server.messages()
    assert [names(first), names(two), names(one)] == [["a", "b"], ["c", "a"], ["-b"]]
    assert isinstance(first, Listed)
    assert first.kind is Kind.SERVICES
    assert [type(message) for message in (accepted, bookmark, again)] == [Alive] * 3
    listed, watched, resumed = server.queries
    selector = {"labelSelector": "!service.kubernetes.io/headless,!service.kubernetes.io/service-proxy-name"}
    assert listed == {**selector, "limit": "500", "resourceVersion": "0"}
    assert 300 <= int(watched.pop("timeoutSeconds")) <= 600
    assert watched == {**selector, "watch": "1", "allowWatchBookmarks": "true", "resourceVersion": "100"}
    assert resumed["resourceVersion"] == "110"


def test_events_may_be_cut_anywhere() -> None:
    """A line may come in any number of chunks, and a chunk may hold any number of lines."""
    text = event("ADDED", raw("a", "101")) + b"\n" + event("ADDED", raw("b", "102"))
    for cut in range(1, len(text)):
        server = Server(Answer(listing()), Answer(text[:cut], text[cut:]))
        found = [names(message) for message in server.messages() if isinstance(message, Changed)]
        assert list(itertools.chain(*found)) == ["a", "b"]


def test_a_long_list_comes_in_pages() -> None:
    """Pages make one list, with the version of the last."""
    server = Server(
        Answer(listing(raw("a"), version="7", more="token")), Answer(listing(raw("b"), version="8"))
    )
    server.answers.append(Answer())
    assert names(server.messages()[0]) == ["a", "b"]
    assert server.queries[1]["continue"] == "token"
    assert "resourceVersion" not in server.queries[1]
    assert server.queries[2]["resourceVersion"] == "8"


@pytest.mark.parametrize("expired", [Answer(error_event(410)), Answer(status=410)])
def test_an_expired_version_leads_to_a_list_from_the_cache(expired: Answer) -> None:
    """410, as a status or as an event, is followed after a pause by a list of version 0, never a full one of etcd."""
    server = Server(Answer(listing(raw("a"))), expired, Answer(listing(raw("b"))), Answer())
    found = [message for message in server.messages() if not isinstance(message, Alive)]
    assert [type(message) for message in found] == [Listed, Trouble, Listed]
    assert isinstance(found[1], Trouble)
    assert found[1].reason == "expired"
    assert server.queries[2]["resourceVersion"] == "0"
    assert "watch" not in server.queries[2]


def test_a_watch_that_breaks_goes_on_where_it_was() -> None:
    """Silence or a cut connection costs a new watch from the last version, not a new list."""
    server = Server(
        Answer(listing()),
        Answer(event("ADDED", raw("a", "101")), ApiError("timeout", "silence")),
        ApiError("unreachable", "refused"),
        Answer(event("ADDED", raw("b", "102"))),
    )
    found = [message for message in server.messages() if not isinstance(message, Alive)]
    assert [message.reason if isinstance(message, Trouble) else names(message) for message in found] == [
        [],
        ["a"],
        "timeout",
        "unreachable",
        ["b"],
    ]
    assert [query["resourceVersion"] for query in server.queries] == ["0", "100", "101", "101"]


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (401, "unauthorized"),
        (403, "forbidden"),
        (404, "not_found"),
        (429, "throttled"),
        (302, "http_error"),
        (503, "server_error"),
    ],
)
def test_refusals_have_reasons_of_their_own(status: int, reason: str) -> None:
    """Each status that an operator can act on is told apart, in the list and in the watch."""
    for server in (Server(Answer(status=status)), Server(Answer(listing()), Answer(status=status))):
        trouble = server.messages()[-1]
        assert isinstance(trouble, Trouble)
        assert trouble.reason == reason
        assert trouble.reason in ApiError.reasons
        assert str(status) in trouble.detail


def test_pauses_grow_until_the_server_has_something_to_say() -> None:
    """Failures wait longer and longer up to a minute, a change starts over, and Retry-After is respected."""
    refused = ApiError("unreachable", "refused")
    server = Server(*[refused] * 8, Answer(status=429, retry_after=200.0), Answer(listing()))
    server.answers += [Answer(event("ADDED", raw("a"))), refused]
    server.messages()
    for pause, longest in zip(server.pauses, [1, 2, 4, 8, 16, 32, 60, 60], strict=False):
        assert longest / 2 <= pause <= longest
    assert server.pauses[8] == 200.0
    assert server.pauses[9] <= 1.0


def test_a_server_that_only_accepts_is_not_asked_again_and_again() -> None:
    """Streams that end at once without a word are held back like failures."""
    server = Server(Answer(listing()), *[Answer() for _ in range(6)])
    server.messages()
    assert server.pauses[5] >= 16


def test_one_bad_object_is_told_and_the_others_count() -> None:
    """An object that cannot be decoded is rejected without its name; lists and streams go on."""
    server = Server(
        Answer(listing(raw("a"), raw("b", ip="nonsense"), 7)),
        Answer(event("ADDED", raw("c", "101", "nonsense")) + event("ADDED", raw("d", "102"))),
        Answer(),
    )
    found = [message for message in server.messages() if not isinstance(message, Alive)]
    assert [message.detail if isinstance(message, Rejected) else names(message) for message in found] == [
        "spec.clusterIPs[0]: expected an IP address",
        "the object: expected a mapping",
        ["a"],
        "spec.clusterIPs[0]: expected an IP address",
        ["d"],
    ]
    assert server.queries[-1]["resourceVersion"] == "102"


@pytest.mark.parametrize(
    "answers",
    [
        (Answer(b"<html>"),),
        (Answer(b"[]"),),
        (Answer(b'{"items": 7}'),),
        (Answer(listing()), Answer(b"no JSON\n")),
        (Answer(listing()), Answer(b'{"type": "ADDED"}\n')),
        (Answer(listing()), Answer(*[b"x" * (1 << 20)] * 17)),
    ],
)
def test_what_is_no_api_server_is_said_to_be_none(answers: tuple[Answer, ...]) -> None:
    """A proxy's page, a foreign document or an endless line is a trouble, and no more."""
    trouble = Server(*answers).messages()[-1]
    assert isinstance(trouble, Trouble)
    assert trouble.reason == "malformed_stream"


def test_a_backoff_is_jittered_and_bounded() -> None:
    """Two nodes do not come back in step, and none waits longer than a minute."""
    one, other = Backoff(random.Random(1)), Backoff(random.Random(2))
    first, second = [one.next() for _ in range(20)], [other.next() for _ in range(20)]
    assert first != second
    assert max(first + second) <= 60


def initial_end(version: str) -> bytes:
    """The bookmark that ends the objects which there were."""
    annotations = {"k8s.io/initial-events-end": "true"}
    return event("BOOKMARK", {"metadata": {"resourceVersion": version, "annotations": annotations}})


def test_a_watch_may_begin_with_all_objects() -> None:
    """Where the server can, objects come as events: together they are a list, and the same stream is the watch."""
    server = Server(
        Answer(
            event("ADDED", raw("a", "90")) + event("ADDED", raw("gone", "91")),
            event("DELETED", raw("gone", "95")) + event("ADDED", raw("b", "80")) + initial_end("100"),
            event("ADDED", raw("c", "101")),
        ),
        Answer(),
        initial_events=True,
    )
    first, *rest = [message for message in server.messages() if not isinstance(message, Alive)]
    assert isinstance(first, Listed)
    assert names(first) == ["a", "b"]
    assert [names(message) for message in rest] == [["c"]]
    begun, resumed = server.queries
    assert begun.pop("timeoutSeconds")
    assert begun == {
        "labelSelector": "!service.kubernetes.io/headless,!service.kubernetes.io/service-proxy-name",
        "watch": "1",
        "allowWatchBookmarks": "true",
        "sendInitialEvents": "true",
        "resourceVersionMatch": "NotOlderThan",
        "resourceVersion": "0",
    }
    assert resumed["resourceVersion"] == "101"
    assert "sendInitialEvents" not in resumed


def test_objects_that_came_in_part_are_no_list() -> None:
    """A stream that breaks before all objects have come begins anew; names are not taken from a part."""
    server = Server(
        Answer(event("ADDED", raw("a", "90")), ApiError("disconnected", "cut")),
        Answer(
            event("ADDED", raw("b", "90")) + event("ADDED", raw("bad", "91", "nonsense")) + initial_end("100")
        ),
        Answer(),
        initial_events=True,
    )
    found = [message for message in server.messages() if not isinstance(message, Alive)]
    assert [type(message) for message in found] == [Trouble, Rejected, Listed]
    assert names(found[2]) == ["b"]
    assert "sendInitialEvents" in server.queries[1]


def test_an_expired_version_leads_to_a_watch_from_the_beginning() -> None:
    """410 empties the cursor: the next watch begins with all objects again."""
    server = Server(
        Answer(initial_end("100")),
        Answer(error_event(410)),
        Answer(event("ADDED", raw("b", "90")) + initial_end("200")),
        Answer(),
        initial_events=True,
    )
    found = [message for message in server.messages() if not isinstance(message, Alive)]
    assert [message.reason if isinstance(message, Trouble) else names(message) for message in found] == [
        [],
        "expired",
        ["b"],
    ]
    assert [query["resourceVersion"] for query in server.queries] == ["0", "100", "0", "200"]
