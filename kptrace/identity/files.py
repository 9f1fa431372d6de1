# SPDX-License-Identifier: Apache-2.0
"""`--identity-file`: a manifest that is read at the start, and again by a worker thread whenever it changes."""

import os
import queue
import stat
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from kptrace.identity.feed import Listed, Message, Trouble
from kptrace.identity.manifests import MalformedError, Records, parse
from kptrace.model.errors import ManifestError

SCOPE = "file"

_Signature = tuple[int, int, int, int]


class FileFeed:
    """Objects from a file.

    The file is looked at with every `drain`. It is read once its size, time and inode are new, and the same in two
    looks in a row: a writer in the middle of its work is not taken at its word. What cannot be read or understood is
    told once for every change of the file.
    """

    source = "file"
    scopes = (SCOPE,)
    reasons = ("unreadable", "malformed")

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Read from `path`; `clock` gives monotonic seconds."""
        self._path = path
        self._clock = clock
        self._pending: list[Message] = []
        self._results: queue.SimpleQueue[list[Message]] = queue.SimpleQueue()
        self._worker: threading.Thread | None = None
        self._read: _Signature | None = None
        self._seen: _Signature | None = None

    def start(self) -> None:
        """Read the file now.

        Raises:
            ManifestError: it cannot be read or understood.
        """
        self._read = self._seen = _signature(self._path)
        self._pending.extend(self._listed(_load(self._path)))

    def drain(self) -> Sequence[Message]:
        """Look at the file; all kinds of objects of a file that was read come together."""
        messages, self._pending = self._pending, []
        while not self._results.empty():
            messages.extend(self._results.get_nowait())
        if self._worker is None or not self._worker.is_alive():
            messages.extend(self._look())
        return messages

    def close(self) -> None:
        """Wait for the worker."""
        if self._worker is not None:
            self._worker.join()
            self._worker = None

    def _look(self) -> list[Message]:
        try:
            signature = _signature(self._path)
        except ManifestError as error:
            news = self._read is not None
            self._read = self._seen = None
            return [self._trouble(error)] if news else []
        stable, self._seen = signature == self._seen, signature
        if stable and signature != self._read:
            self._read = signature
            self._worker = threading.Thread(target=self._work, name="kptrace-identity-file", daemon=True)
            self._worker.start()
        return []

    def _work(self) -> None:
        try:
            self._results.put(self._listed(_load(self._path)))
        except ManifestError as error:
            self._results.put([self._trouble(error)])

    def _listed(self, records: Records) -> list[Message]:
        at = self._clock()
        return [Listed(SCOPE, at, kind, found) for kind, found in records.items()]

    def _trouble(self, error: ManifestError) -> Trouble:
        if isinstance(error, MalformedError):
            return Trouble(SCOPE, self._clock(), "malformed", error.detail, error.one_line())
        return Trouble(SCOPE, self._clock(), "unreadable", str(error), error.one_line())


def _signature(path: Path) -> _Signature:
    try:
        found = path.stat()
    except OSError as error:
        raise _unreadable(path, error) from error
    if not stat.S_ISREG(found.st_mode):
        raise ManifestError(
            f"{path} is no regular file", remedy="write the objects to a file, which may change later"
        )
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _load(path: Path) -> Records:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error
    return parse(data, os.fspath(path))


def _unreadable(path: Path, error: OSError) -> ManifestError:
    return ManifestError(f"cannot read {path}: {error.strerror}", remedy="see --identity-file")
