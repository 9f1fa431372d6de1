# SPDX-License-Identifier: Apache-2.0
"""Which program runs, or ran a moment ago, under a process id: exec and exit records, and procfs for the older ones."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

from kptrace.model.rewrite import ProcessRun
from kptrace.signals.process_records import Exec, Exit

#: Seconds that a process is remembered after its end: its records may come late, and a sync outlives its writer.
KEEP_SECONDS = 60.0
MAX_PROCESSES = 4096
_MAX_PARENTS = 8


class ProcessTable:
    """Bounded, by process id; the oldest are forgotten first."""

    def __init__(self, look: Callable[[int], ProcessRun | None], host_mntns: int = 0) -> None:
        """Remember nothing yet.

        Args:
            look: finds a living process that no exec record told of (`read_process`).
            host_mntns: inode of the host's mount namespace, 0 if unknown.
        """
        self._look = look
        self._host_mntns = host_mntns
        self._runs: OrderedDict[int, ProcessRun] = OrderedDict()
        self._ended: OrderedDict[int, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._runs)

    def apply(self, record: Exec | Exit, now: float) -> None:
        """Take a record in; `now` is monotonic seconds."""
        if isinstance(record, Exit):
            if record.tgid in self._runs:
                self._ended[record.tgid] = now
                self._ended.move_to_end(record.tgid)
        else:
            self._remember(
                ProcessRun(
                    tgid=record.tgid,
                    parent=record.parent,
                    started_ns=record.at_ns,
                    comm=record.comm,
                    executable=record.filename,
                    cgroup_id=record.cgroup_id,
                    host_namespaces=bool(self._host_mntns) and record.mntns == self._host_mntns,
                )
            )
        self._expire(now)

    def _remember(self, run: ProcessRun) -> None:
        self._ended.pop(run.tgid, None)
        self._runs[run.tgid] = run
        self._runs.move_to_end(run.tgid)
        while len(self._runs) > MAX_PROCESSES:
            oldest, _ = self._runs.popitem(last=False)
            self._ended.pop(oldest, None)

    def _expire(self, now: float) -> None:
        while self._ended:
            tgid, at = next(iter(self._ended.items()))
            if now - at < KEEP_SECONDS:
                return
            del self._ended[tgid]
            self._runs.pop(tgid, None)

    def run(self, tgid: int) -> ProcessRun | None:
        """The process's present or last program."""
        known = self._runs.get(tgid)
        if known is None and tgid:
            known = self._look(tgid)
            if known is not None:
                self._remember(known)
        return known

    def chain(self, tgid: int, parents: Sequence[int] = ()) -> list[ProcessRun]:
        """The process and its known ancestors, nearest first.

        Args:
            tgid: the process.
            parents: its ancestors as the kernel saw them at the event; by default those of the records, which a
                parent's death does not change.
        """
        found: list[ProcessRun] = []
        seen: set[int] = set()
        following = [tgid, *parents]
        while following and len(found) < _MAX_PARENTS:
            current = following.pop(0)
            if current in seen or current <= 0:
                continue
            seen.add(current)
            run = self.run(current)
            if run is not None:
                found.append(run)
                if not following:
                    following.append(run.parent)
        return found


def read_process(proc: Path, tgid: int, host_mntns: int = 0) -> ProcessRun | None:
    """A living process from procfs; None if it is gone, or is a kernel thread."""
    folder = proc / str(tgid)
    try:
        executable = str((folder / "exe").readlink())
        # The name may hold spaces and parentheses: fields count from behind its end.
        head, _, rest = (folder / "stat").read_text(errors="backslashreplace").rpartition(")")
        mntns = (folder / "ns/mnt").stat().st_ino if host_mntns else 0
    except OSError:
        return None
    return ProcessRun(
        tgid=tgid,
        parent=int(rest.split()[1]),
        comm=head.partition("(")[2],
        executable=executable.removesuffix(" (deleted)"),
        host_namespaces=bool(host_mntns) and mntns == host_mntns,
    )


def cgroup_path(proc: Path, tgid: int) -> str:
    """The process's cgroup, as the unified hierarchy or systemd's own has it; empty if it is gone or in the root."""
    try:
        # Of bytes, and at newlines only: a cgroup's name may hold every other character that ends lines in Python.
        lines = (proc / str(tgid) / "cgroup").read_bytes().decode(errors="backslashreplace").split("\n")
    except OSError:
        return ""
    paths = {name: path for _, name, path in (line.split(":", 2) for line in lines if line.count(":") >= 2)}
    return next((paths[name] for name in ("", "name=systemd") if paths.get(name, "/") != "/"), "")
