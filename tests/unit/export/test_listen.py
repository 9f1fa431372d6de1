# SPDX-License-Identifier: Apache-2.0
"""The local socket: who may open it, and what is in its way."""

import socket
import stat
from pathlib import Path

import pytest

from kptrace.export.listen import listen_unix
from kptrace.model.errors import ListenError


def test_only_the_owner_may_open_it(tmp_path: Path) -> None:
    """The folder is made, and the socket has mode 0600 whatever the umask."""
    path = tmp_path / "run" / "kptrace.sock"
    with listen_unix(path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert [each.name for each in path.parent.iterdir()] == ["kptrace.sock"]
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))


def test_what_a_dead_process_left_is_replaced(tmp_path: Path) -> None:
    """A socket that nobody listens on is in nobody's way."""
    path = tmp_path / "kptrace.sock"
    listen_unix(path).close()
    assert path.is_socket()
    with listen_unix(path), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))


def test_a_living_daemon_keeps_its_socket(tmp_path: Path) -> None:
    """A second daemon is refused, with a remedy, and the first one's socket still answers."""
    path = tmp_path / "kptrace.sock"
    with listen_unix(path) as first:
        with pytest.raises(ListenError, match="in use") as error:
            listen_unix(path)
        assert "--local-socket" in error.value.remedy
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            first.accept()[0].close()
        assert [each.name for each in tmp_path.iterdir()] == ["kptrace.sock"]


def test_a_folder_that_cannot_be_is_one_line(tmp_path: Path) -> None:
    """A file where the folder should be is an error with its reason."""
    (tmp_path / "run").write_text("no folder")
    with pytest.raises(ListenError, match="File exists"):
        listen_unix(tmp_path / "run" / "kptrace.sock")
