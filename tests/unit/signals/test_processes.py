# SPDX-License-Identifier: Apache-2.0
"""Who runs, or ran a moment ago: bounded, and right through reuse of process ids and late records."""

import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kptrace.model.rewrite import ProcessRun
from kptrace.signals import processes
from kptrace.signals.process_records import Exec, Exit
from kptrace.signals.processes import KEEP_SECONDS, MAX_PROCESSES, ProcessTable, cgroup_path, read_process

HOST_MNTNS = 4026531841


def began(tgid: int, filename: str = "/usr/sbin/nft", parent: int = 0, *, mntns: int = 0) -> Exec:
    """An exec record."""
    return Exec(tgid, 1000 + tgid, 70 + tgid, (parent,), 1, mntns, "comm", filename)


class Living:
    """Processes that only procfs knows; counts how often it is asked."""

    def __init__(self, *runs: ProcessRun) -> None:
        self.runs = {run.tgid: run for run in runs}
        self.asked: list[int] = []

    def __call__(self, tgid: int) -> ProcessRun | None:
        """Look one up."""
        self.asked.append(tgid)
        return self.runs.get(tgid)


def table(*records: Exec | Exit, living: Living | None = None, now: float = 0.0) -> ProcessTable:
    """A table with these records taken in at one time."""
    made = ProcessTable(living or Living(), HOST_MNTNS)
    for record in records:
        made.apply(record, now)
    return made


def tgids(runs: Iterable[ProcessRun]) -> list[int]:
    """Their process ids."""
    return [run.tgid for run in runs]


def test_an_exec_record_tells_all_of_a_run() -> None:
    """Its fields arrive under their names."""
    assert table(began(5, "/sbin/nft", parent=4)).run(5) == ProcessRun(
        tgid=5, parent=4, started_ns=1005, comm="comm", executable="/sbin/nft", cgroup_id=75
    )


@pytest.mark.parametrize(
    ("host", "mntns", "inside"),
    [(HOST_MNTNS, HOST_MNTNS, True), (HOST_MNTNS, 9, False), (0, 0, False), (0, 9, False)],
)
def test_the_hosts_mount_namespace_is_recognised(host: int, mntns: int, inside: bool) -> None:
    """A process is the host's if its mount namespace is; where the host's is unknown, nobody is."""
    made = ProcessTable(Living(), host)
    made.apply(began(5, mntns=mntns), 0.0)
    run = made.run(5)
    assert run is not None
    assert run.host_namespaces is inside


def test_a_process_is_remembered_for_a_while_after_its_end() -> None:
    """`nft` is gone when its record is read: it is forgotten only after the time that is kept."""
    made = table(began(5), Exit(5, 2000, 0), now=10.0)
    made.apply(began(6), 10.0 + KEEP_SECONDS - 0.01)
    assert made.run(5) is not None
    made.apply(began(7), 10.0 + KEEP_SECONDS)
    assert made.run(5) is None
    assert len(made) == 2


def test_a_process_id_that_is_used_again_is_the_new_program() -> None:
    """The earlier program's end neither hides nor forgets the later one."""
    made = table(began(5, "/bin/old"), Exit(5, 1, 0), began(5, "/bin/new"), now=10.0)
    made.apply(began(6), 10.0 + 2 * KEEP_SECONDS)
    run = made.run(5)
    assert run is not None
    assert run.executable == "/bin/new"


def test_a_second_exec_is_the_present_program() -> None:
    """A shell that becomes nft is nft."""
    made = table(began(5, "/bin/sh"), began(5, "/usr/sbin/nft"))
    assert [run.executable for run in made.chain(5)] == ["/usr/sbin/nft"]
    assert len(made) == 1


def test_the_end_of_an_unknown_process_is_not_remembered() -> None:
    """Most processes of a node end without having been of interest."""
    made = table(*(Exit(n, 1, 0) for n in range(1, 10_001)))
    assert len(made) == 0
    assert len(made._ended) == 0


def test_a_living_process_is_read_once() -> None:
    """An older process than kptrace comes from procfs, and is remembered until its end."""
    living = Living(ProcessRun(7, executable="/kube-proxy"))
    made = table(living=living)
    assert made.run(7) == made.run(7) == living.runs[7]
    assert living.asked == [7]
    made.apply(Exit(7, 1, 0), 5.0)
    living.runs.clear()
    assert made.run(7) is not None
    made.apply(began(8), 5.0 + KEEP_SECONDS)
    assert made.run(7) is None


def test_nobody_is_looked_for_under_process_id_zero() -> None:
    """The parent of the first process is no process."""
    living = Living()
    assert table(living=living).run(0) is None
    assert living.asked == []


def test_a_chain_follows_the_parents_of_the_records() -> None:
    """Without the kernel's list, each process tells of its parent."""
    made = table(began(3, parent=2), began(2, parent=1), living=Living(ProcessRun(1)))
    assert tgids(made.chain(3)) == [3, 2, 1]


def test_a_chain_follows_the_kernels_list_where_there_is_one() -> None:
    """A parent that died meanwhile was still the parent; beyond the list's end the records go on."""
    made = table(began(3, parent=1), began(2, parent=1), began(9, parent=8), began(8, parent=0))
    assert tgids(made.chain(3, (2, 9))) == [3, 2, 9, 8]


def test_an_unknown_link_does_not_end_the_kernels_list() -> None:
    """A shell that nobody saw may stand between nft and its writer."""
    assert tgids(table(began(3), began(1)).chain(3, (2, 1))) == [3, 1]
    assert tgids(table(began(1)).chain(3, (2, 1))) == [1]


def test_a_chain_of_unknown_processes_is_empty() -> None:
    """Nobody is known, nobody is made up."""
    assert table().chain(3, (2, 1)) == []


def test_a_chain_stops_at_a_circle() -> None:
    """Process ids that were used again can make each other's parents."""
    assert tgids(table(began(3, parent=2), began(2, parent=3)).chain(3)) == [3, 2]
    assert tgids(table(began(3, parent=3)).chain(3, (3, 3))) == [3]


def test_a_chain_is_bounded() -> None:
    """A very deep process tree costs no more than a few look-ups."""
    made = table(*(began(n, parent=n - 1) for n in range(2, 200)))
    assert tgids(made.chain(199)) == list(range(199, 199 - processes._MAX_PARENTS, -1))


def test_a_flood_of_processes_forgets_the_oldest() -> None:
    """Beyond the bound, those that began first are forgotten, with their ends; the newest are there."""
    made = table(*(began(n) for n in range(1, MAX_PROCESSES + 1)), Exit(1, 1, 0), Exit(2, 1, 0))
    made.apply(began(MAX_PROCESSES + 1), 0.0)
    assert len(made) == MAX_PROCESSES
    assert made.run(1) is None
    assert list(made._ended) == [2]
    assert made.run(MAX_PROCESSES + 1) is not None


def test_a_process_that_begins_another_program_is_young_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its place among those that are forgotten is that of its last program."""
    monkeypatch.setattr(processes, "MAX_PROCESSES", 3)
    made = table(began(1), began(2), began(3), began(1), began(4))
    assert [made.run(tgid) is not None for tgid in (1, 2, 3, 4)] == [True, False, True, True]


def test_processes_from_procfs_are_bounded_too() -> None:
    """Writers whose exec nobody saw fill the same bounded table."""
    many = Living(*(ProcessRun(n) for n in range(1, MAX_PROCESSES + 500)))
    made = table(living=many)
    for tgid in many.runs:
        assert made.run(tgid) is not None
    assert len(made) == MAX_PROCESSES


steps = st.lists(
    st.tuples(
        st.sampled_from(["exec", "exit", "look"]),
        st.integers(0, 12),
        st.integers(0, 12),
        st.floats(0, KEEP_SECONDS),
    ),
    max_size=60,
)


@settings(deadline=None)  # a busy machine is no failure
@given(steps)
def test_no_sequence_of_events_breaks_the_bounds(events: list[tuple[str, int, int, float]]) -> None:
    """Whatever begins, ends and is asked for: the table is bounded, ends are of known processes, chains have no circle."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "MAX_PROCESSES", 5)
        made = ProcessTable(lambda tgid: ProcessRun(tgid, parent=tgid - 1) if tgid % 3 else None)
        now = 0.0
        for action, tgid, parent, passed in events:
            now += passed
            if action == "look":
                found = tgids(made.chain(tgid, (parent, 1)))
                assert len(set(found)) == len(found) <= processes._MAX_PARENTS
            else:
                made.apply(Exit(tgid, 0, 0) if action == "exit" else began(tgid, parent=parent), now)
                assert all(now - at < KEEP_SECONDS for at in made._ended.values())
            assert len(made) <= 5
            assert made._ended.keys() <= made._runs.keys()


def write_process(proc: Path, tgid: int, executable: str, name: str = "comm", parent: int = 1) -> None:
    """A process's files as procfs has them."""
    folder = proc / str(tgid)
    (folder / "ns").mkdir(parents=True)
    (folder / "exe").symlink_to(executable)
    (folder / "stat").write_bytes(f"{tgid} ({name}) S {parent} {tgid} {tgid} 0 -1 0\n".encode())
    (folder / "ns/mnt").write_text("")


@pytest.mark.parametrize("name", ["nft", "a b", "a) S 9 (b", "((", ") R 5", "tmux: server", "köln"])
def test_a_processs_name_does_not_hide_its_parent(tmp_path: Path, name: str) -> None:
    """Spaces, parentheses and look-alike fields in the name are the name's."""
    write_process(tmp_path, 7, "/usr/sbin/nft", name, parent=42)
    assert read_process(tmp_path, 7) == ProcessRun(7, parent=42, comm=name, executable="/usr/sbin/nft")


def test_a_replaced_executable_keeps_its_name(tmp_path: Path) -> None:
    """After an upgrade the running program's file is deleted, as procfs says behind its path."""
    write_process(tmp_path, 7, "/usr/local/bin/kube-proxy (deleted)")
    run = read_process(tmp_path, 7)
    assert run is not None
    assert run.executable == "/usr/local/bin/kube-proxy"


def test_the_hosts_processes_are_recognised_in_procfs(tmp_path: Path) -> None:
    """The inode of the process's mount namespace is compared with the host's, if that is known."""
    write_process(tmp_path, 7, "/bin/x")
    inode = (tmp_path / "7/ns/mnt").stat().st_ino
    for host, inside in ((inode, True), (inode + 1, False), (0, False)):
        run = read_process(tmp_path, 7, host)
        assert run is not None
        assert run.host_namespaces is inside


@pytest.mark.parametrize("missing", ["", "exe", "stat", "ns"])
def test_a_process_that_goes_away_meanwhile_is_none(tmp_path: Path, missing: str) -> None:
    """Whichever file is gone first, and for kernel threads, which have no executable."""
    write_process(tmp_path, 7, "/bin/x")
    gone = tmp_path / "7" / missing
    if gone.is_dir():
        shutil.rmtree(gone)
    else:
        gone.unlink()
    assert read_process(tmp_path, 7, 1) is None


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("0::/system.slice/kubelet.service\n", "/system.slice/kubelet.service"),
        ("12:cpu,cpuacct:/x\n1:name=systemd:/system.slice/a.service\n0::/\n", "/system.slice/a.service"),
        ("1:name=systemd:/a\n0::/b\n", "/b"),
        ("0::/a:b:c\n", "/a:b:c"),
        ("12:cpu:/x\n", ""),
        ("0::/\n", ""),
        ("", ""),
        ("nonsense\n", ""),
    ],
    ids=["unified", "legacy", "both", "colons", "controllers-only", "root", "empty", "nonsense"],
)
def test_the_cgroup_is_that_of_the_unified_hierarchy_or_systemds(
    tmp_path: Path, text: str, path: str
) -> None:
    """Controllers' own hierarchies and the root say nothing of who a process belongs to."""
    (tmp_path / "7").mkdir()
    (tmp_path / "7/cgroup").write_text(text)
    assert cgroup_path(tmp_path, 7) == path


@pytest.mark.parametrize("character", ["\r", "\x0b", "\x0c", "\x1c", "\x85", "\u2028"])
def test_a_cgroups_name_cannot_forge_a_line(tmp_path: Path, character: str) -> None:
    """Only a newline, which a cgroup's name cannot hold, begins a second entry."""
    path = f"/pod/x{character}0::/system.slice/kubelet.service"
    (tmp_path / "7").mkdir()
    (tmp_path / "7/cgroup").write_bytes(f"0::{path}\n".encode())
    assert cgroup_path(tmp_path, 7) == path


def test_a_process_that_is_gone_has_no_cgroup(tmp_path: Path) -> None:
    """Nothing is raised for it."""
    assert cgroup_path(tmp_path, 7) == ""
