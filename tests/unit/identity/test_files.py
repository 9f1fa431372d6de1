# SPDX-License-Identifier: Apache-2.0
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kptrace.identity.feed import Listed, Message, Trouble
from kptrace.identity.files import FileFeed
from kptrace.identity.records import Kind
from kptrace.model.errors import ManifestError


def manifest(name: str, ip: str = "10.96.0.1") -> str:
    """One Service in namespace `ns`."""
    return (
        f"apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: ns}}\n"
        f"spec: {{clusterIP: {ip}, ports: [{{port: 80}}]}}\n"
    )


def services(messages: list[Message]) -> list[str]:
    """Names of the Services in the last list among the messages."""
    found = [message for message in messages if isinstance(message, Listed) and message.kind is Kind.SERVICES]
    return [record.key[1] for record in found[-1].records] if found else []


def drained_until(feed: FileFeed, enough: Callable[[list[Message]], bool]) -> list[Message]:
    """Drain again and again until there is enough."""
    messages: list[Message] = []
    deadline = time.monotonic() + 20
    while not enough(messages):
        assert time.monotonic() < deadline, messages
        messages.extend(feed.drain())
        time.sleep(0.001)
    return messages


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A manifest with the Service `one`."""
    found = tmp_path / "names.yaml"
    found.write_text(manifest("one"), encoding="utf-8")
    return found


def test_a_file_is_read_at_the_start_and_once_for_every_change(path: Path) -> None:
    """All four kinds come together; the file is read again when it is replaced or rewritten, and else left alone."""
    feed = FileFeed(path, clock=lambda: 5.0)
    feed.start()
    first = list(feed.drain())
    assert [message.kind for message in first if isinstance(message, Listed)] == list(Kind)
    assert {message.at for message in first} == {5.0}
    assert services(first) == ["one"]
    assert not any(feed.drain() for _ in range(5))
    fresh = path.with_suffix(".new")
    fresh.write_text(manifest("two"), encoding="utf-8")
    fresh.rename(path)
    assert services(drained_until(feed, bool)) == ["two"]
    path.write_text(manifest("three"), encoding="utf-8")
    assert services(drained_until(feed, bool)) == ["three"]
    feed.close()
    assert not any(feed.drain() for _ in range(5))
    feed.close()


def test_a_file_that_is_being_written_is_left_alone_until_it_rests(path: Path) -> None:
    """A file that differs from the last look is not read, however often one looks."""
    feed = FileFeed(path)
    feed.start()
    feed.drain()
    for size in range(1, 20):
        path.write_text(manifest("two") + "#" * size, encoding="utf-8")
        assert feed.drain() == []
    assert services(drained_until(feed, bool)) == ["two"]
    feed.close()


def test_at_the_start_a_bad_file_is_an_error(tmp_path: Path, path: Path) -> None:
    """Missing, a directory, a pipe that cannot be read twice, or malformed: each says which file and what it is."""
    with pytest.raises(ManifestError, match=r"cannot read .*missing.yaml: No such file"):
        FileFeed(tmp_path / "missing.yaml").start()
    with pytest.raises(ManifestError, match="no regular file"):
        FileFeed(tmp_path).start()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ManifestError, match="no regular file"):
        FileFeed(tmp_path / "pipe").start()
    path.write_text("a: [", encoding="utf-8")
    with pytest.raises(ManifestError, match=r"names.yaml: line"):
        FileFeed(path).start()


def test_later_a_bad_file_is_a_trouble_told_once(path: Path) -> None:
    """A malformed or missing file later gives one trouble for each change, and the file is taken again when good."""
    feed = FileFeed(path)
    feed.start()
    feed.drain()
    path.write_text(manifest("secret-name", "nonsense"), encoding="utf-8")
    (trouble,) = drained_until(feed, bool)
    assert isinstance(trouble, Trouble)
    assert (trouble.scope, trouble.reason) == ("file", "malformed")
    assert "secret-name" in trouble.message
    assert "secret-name" not in trouble.detail
    assert "expected an IP address" in trouble.detail
    feed.close()
    path.unlink()
    (trouble,) = drained_until(feed, bool)
    assert isinstance(trouble, Trouble)
    assert trouble.reason == "unreadable"
    assert not any(feed.drain() for _ in range(5))
    path.write_text(manifest("back"), encoding="utf-8")
    assert services(drained_until(feed, bool)) == ["back"]
    feed.close()
