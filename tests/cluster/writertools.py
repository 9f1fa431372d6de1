# SPDX-License-Identifier: Apache-2.0
"""The tools that kube-proxy writes rules with, in a folder for the front of its PATH: noted, made to fail, or held.

Each is a small script that becomes the real tool, in the same process: what kube-proxy writes is kept under the process
id, so that a test knows what was in each transaction.
"""

import base64
import hashlib
import os
import re
import shutil
import signal
from pathlib import Path

from kptrace.experiments.services import ServiceSpec
from tests.cluster.kubeproxy import Mode, iptables_variant
from tests.cluster.programs import ClusterError, wait_for

_SCRIPT = """\
#!/bin/sh
[ ! -e {folder}/fail ] || exit 1
case "$*" in
"-f -" | *--noflush*)
    cat >{folder}/new.$$ && mv {folder}/new.$$ {folder}/input.$$
    if mv {folder}/hold {folder}/held.$$ 2>/dev/null; then
        exec {real} "$@" <{folder}/fifo
    fi
    exec {real} "$@" <{folder}/input.$$
    ;;
esac
exec {real} "$@"
"""
_NFTABLES = ("nft",)
_IPTABLES = tuple(
    f"{name}{suffix}" for name in ("iptables", "ip6tables") for suffix in ("", "-save", "-restore")
)


class WriterTools:
    """The tools of one mode, in `path`."""

    def __init__(self, folder: Path, mode: Mode) -> None:
        """Make them; both kinds, since kube-proxy cleans up after the other mode when it starts."""
        self.path = folder / "tools"
        self._state = folder / "state"
        for made in (self.path, self._state):
            made.mkdir(parents=True)
        os.mkfifo(self._state / "fifo")
        variant = "nft" if mode is Mode.NFTABLES else mode.removeprefix("iptables-")
        real = iptables_variant(folder / "bin", variant)
        for name in (*_NFTABLES, *_IPTABLES):
            where = shutil.which(name) if name in _NFTABLES else str(real / name)
            if where is None:
                raise ClusterError(f"there is no {name}: apt-get install nftables")
            script = self.path / name
            script.write_text(_SCRIPT.format(folder=self._state, real=where), encoding="ascii")
            script.chmod(0o755)

    def fail(self) -> None:
        """From now on every tool fails at once."""
        (self._state / "fail").touch()

    def mend(self) -> None:
        """From now on they work again."""
        (self._state / "fail").unlink()

    def hold(self) -> None:
        """The next tool that is to write waits for its input."""
        (self._state / "hold").touch()

    def stop_held(self) -> int:
        """Wait for the held tool, stop it by SIGSTOP in the middle of its work, and return its process id."""
        wait_for(lambda: bool(list(self._state.glob("held.*"))), "a held tool")
        (held,) = self._state.glob("held.*")
        pid = int(held.suffix[1:])
        # Only now the shell becomes the tool: it waits for somebody who writes.
        with (self._state / "fifo").open("wb") as fifo:
            wait_for(lambda: Path(f"/proc/{pid}/comm").read_text() != "sh\n", "the tool itself")
            wait_for(lambda: "/sh" not in str(Path(f"/proc/{pid}/exe").readlink()), "the tool itself")
            os.kill(pid, signal.SIGSTOP)
            wait_for(lambda: _state(pid) == "T", "a stopped tool")
            fifo.write((self._state / f"input.{pid}").read_bytes())
        return pid

    def inputs(self) -> dict[int, str]:
        """What was written so far, by process id."""
        return {
            int(path.suffix[1:]): path.read_text(encoding="utf-8") for path in self._state.glob("input.*")
        }

    def writes_of(self, address: str) -> list[int]:
        """The processes that wrote a rule which leads to this address and port (`10.244.0.1:8080`)."""
        ip, _, port = address.rpartition(":")
        word = re.compile(rf"(?<![0-9.]){re.escape(ip)}(?: \. |:){port}(?![0-9])")
        return [pid for pid, text in self.inputs().items() if word.search(text)]

    def writes_of_service(self, service: ServiceSpec) -> list[int]:
        """The processes that wrote the rules of a Service port, or took them away."""
        names = f"{service.port.namespace}/{service.port.name}/{service.protocol}/{service.port.port}"
        digest = hashlib.sha256(f"{service.full_name}{service.protocol}".encode()).digest()
        chain = f"KUBE-SVC-{base64.b32encode(digest).decode()[:16]}"
        # Every sync of the iptables modes has the jump to the chain; only one that writes it says what is in it.
        word = re.compile(
            rf"add rule \S+ kube-proxy service-\S+-{re.escape(names)} |^:{chain} ", re.MULTILINE
        )
        return [pid for pid, text in self.inputs().items() if word.search(text)]


def _state(pid: int) -> str:
    """The state of a process: R, S, T (stopped), Z, ..."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
