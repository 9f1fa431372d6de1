# SPDX-License-Identifier: Apache-2.0
"""The xtables lock on this machine's kernel: who waits and who holds, against /proc/locks, strace and our own clock."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from fcntl import LOCK_EX, LOCK_NB, LOCK_SH, LOCK_UN, flock, lockf
from pathlib import Path

import pytest

from kptrace.experiments.netns import Namespace
from kptrace.kernel.bytecode import Bytecode
from kptrace.kernel.compile import Compiler
from kptrace.signals.rewrite_kernel import REQUEST as REWRITE_REQUEST
from kptrace.signals.task_facts import RDONLY_CAST
from kptrace.signals.xtables_lock_kernel import REQUEST
from tests.native.programs import program_ids
from tests.native.rewrite_bench import RewriteBench
from tests.native.xtables_lock_bench import TESTER, XtablesLockBench

RULES = "*filter\n-A OUTPUT -j ACCEPT\nCOMMIT\n"
RESTORE = "iptables-legacy-restore --noflush -w <rules"


@pytest.fixture(scope="module")
def compiled() -> dict[str, Bytecode]:
    """The programs for this kernel, and for one without bpf_rdonly_cast() (before v6.2)."""
    older = replace(
        REQUEST, facts={name: fact for name, fact in REQUEST.facts.items() if name != RDONLY_CAST}
    )
    built = Compiler(Path("/sys/kernel/btf/vmlinux"), None).build_each([REQUEST, older])
    assert all(isinstance(each, Bytecode) for each in built), built
    return {
        name: each for name, each in zip(("new", "old"), built, strict=True) if isinstance(each, Bytecode)
    }


@pytest.fixture(params=["new", "old"])
def bytecode(request: pytest.FixtureRequest, compiled: dict[str, Bytecode]) -> Bytecode:
    """The programs, in both forms."""
    return compiled[request.param]


@pytest.fixture
def bench(bytecode: Bytecode, namespace: Namespace, tmp_path: Path) -> Iterator[XtablesLockBench]:
    """The signal on the test's namespace."""
    (tmp_path / "rules").write_text(RULES)
    made = XtablesLockBench(bytecode, namespace, tmp_path)
    yield made
    made.close()


@pytest.fixture
def descriptor(bench: XtablesLockBench) -> Iterator[int]:
    """The lock file, opened by the test process."""
    opened = os.open(bench.path, os.O_RDONLY)
    yield opened
    os.close(opened)


def start(bench: XtablesLockBench, script: str, name: str = "kube-proxy") -> "subprocess.Popen[str]":
    """Start a program of this name, which runs a script inside and then stays until `finish`."""
    stay = "\ncode=$?\n: >ran\nread -r _\nexit $code"
    return bench.namespace.popen(bench.shell(script + stay, name), stdin=True)


def finish(bench: XtablesLockBench, process: "subprocess.Popen[str]") -> int:
    """Let it end when its script has, and all that it did is taken in; the script's exit code."""
    bench.until(lambda: (bench.folder / "ran").exists() or process.poll() is not None)
    bench.settle()
    (bench.folder / "ran").unlink(missing_ok=True)
    assert process.stdin
    process.stdin.close()
    return process.wait()


def run(bench: XtablesLockBench, script: str) -> int:
    """Run a script inside to its end; its last command's exit code."""
    return finish(bench, start(bench, script))


def until(condition: Callable[[], bool]) -> None:
    """Wait for something outside of the signal."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.001)


def nobody_is_lost(bench: XtablesLockBench) -> bool:
    """Whether nothing was lost."""
    return not any(bench.signal.losses().values())


def test_writers_wait_for_the_holder(bench: XtablesLockBench, descriptor: int) -> None:
    """Two real iptables-legacy-restore wait as long as another holds the lock; each has its class, and nobody is left."""
    before_lock = time.monotonic_ns()
    bench.flock(descriptor, LOCK_EX)
    after_lock = time.monotonic_ns()
    programs = {
        name: bench.namespace.popen(bench.shell(RESTORE, name)) for name in ("kube-proxy", "calico-node")
    }
    until(lambda: bench.blocked() == len(programs))
    blocked = time.monotonic_ns()
    bench.settle()
    assert set(bench.waiting) == set(programs)
    assert set(bench.holding) == {TESTER}
    assert bench.waited == {TESTER: 1}
    assert bench.held == {}
    (now,) = bench.holding.values()
    assert 0 < max(bench.waiting.values()) <= now
    before_unlock = time.monotonic_ns()
    bench.flock(descriptor, LOCK_UN)
    after_unlock = time.monotonic_ns()
    assert [each.wait() for each in programs.values()] == [0, 0]
    bench.settle()
    assert bench.waited == {TESTER: 1, "kube-proxy": 1, "calico-node": 1} == bench.held
    assert bench.waiting == {} == bench.holding
    first, *_ = bench.holds
    assert before_lock <= first.begin_ns <= after_lock
    assert before_unlock <= first.end_ns <= after_unlock
    own, *waits = bench.waits
    assert own.tgid == os.getpid() == first.tgid
    for wait in waits:
        # Both waited from before we saw them blocked until after the unlock began.
        assert after_lock <= wait.begin_ns <= blocked
        assert wait.end_ns >= before_unlock
        assert wait.end_ns - wait.begin_ns >= before_unlock - blocked
    # The second one got it when the first one was done with it.
    assert max(each.end_ns for each in waits) >= min(each.begin_ns for each in bench.holds[1:])
    assert nobody_is_lost(bench)


def test_the_hold_lies_inside_straces(bench: XtablesLockBench) -> None:
    """A hold lies between strace's stamps before and after it, and so does the wait: orders, no durations of strace's."""
    trace = bench.folder / "trace"
    calls_of = "trace=flock,close,setsockopt,getsockopt,exit_group"
    assert run(bench, f"strace -f -ttt -e {calls_of} -o {trace} {RESTORE}") == 0
    bench.settle()
    (wait,), (hold,) = bench.waits, bench.holds
    lines = [line.split(maxsplit=2) for line in trace.read_text().splitlines()]
    calls = [(float(stamp), text) for _, stamp, text in lines if stamp[0].isdigit()]
    (at,) = [number for number, (_, text) in enumerate(calls) if text.startswith("flock(3, LOCK_EX")]
    end = next(number for number in range(at, len(calls)) if calls[number][1].startswith("close(3)"))
    stamps = [stamp for stamp, _ in calls]
    slack = 2e-6  # stamps are in microseconds
    held = (hold.end_ns - hold.begin_ns) / 1e9
    print(
        f"{held:.6f} s, between {stamps[end] - stamps[at + 1]:.6f} and {stamps[end + 1] - stamps[at]:.6f} s"
    )
    assert stamps[end] - stamps[at + 1] - slack <= held <= stamps[end + 1] - stamps[at] + slack
    assert (wait.end_ns - wait.begin_ns) / 1e9 <= stamps[at + 1] - stamps[at] + slack
    assert wait.end_ns == hold.begin_ns


@pytest.mark.parametrize(
    ("command", "locks"),
    [
        (RESTORE, 1),
        ("iptables-legacy-restore --noflush -w <both", 2),  # one lock a table
        ("iptables-legacy -w -S", 1),  # never closes it: the exit does
        ("ip6tables-legacy -w -S", 1),
        ("iptables-nft -S", 0),  # needs none
        ("iptables-legacy-save", 0),
    ],
)
def test_every_run_is_counted(bench: XtablesLockBench, command: str, locks: int) -> None:
    """A prime number of runs of each tool is that number of waits and of holds, by the tool's parent."""
    (bench.folder / "both").write_text(RULES + RULES.replace("filter", "nat"))
    runs = 13
    assert run(bench, f"for i in $(seq {runs}); do {command} >/dev/null || exit 1; done") == 0
    bench.settle()
    expected = {"kube-proxy": float(runs * locks)} if locks else {}
    assert bench.waited == expected == bench.held
    assert bench.waiting == {} == bench.holding
    assert nobody_is_lost(bench)


def test_attempts_that_fail_are_one_wait(bench: XtablesLockBench, descriptor: int) -> None:
    """Non-blocking attempts, as kube-proxy and old versions of iptables make, are one wait from the first on."""
    other = os.open(bench.path, os.O_RDONLY)
    bench.flock(other, LOCK_EX)
    first = time.monotonic_ns()
    for _ in range(7):
        with pytest.raises(BlockingIOError):
            bench.flock(descriptor, LOCK_EX | LOCK_NB)
        after_first = time.monotonic_ns()
        bench.settle()
        assert set(bench.waiting) == {TESTER}
        assert bench.waited == {TESTER: 1}
    os.close(other)  # its last close is its unlock
    before = time.monotonic_ns()
    bench.flock(descriptor, LOCK_EX | LOCK_NB)
    bench.settle()
    assert bench.waited == {TESTER: 2}
    assert bench.held == {TESTER: 1}
    assert set(bench.holding) == {TESTER}
    wait = bench.waits[-1]
    assert first <= wait.begin_ns <= after_first
    assert wait.end_ns >= before
    assert bench.waiting == {}
    assert nobody_is_lost(bench)


def test_who_gives_up_does_not_wait(bench: XtablesLockBench, descriptor: int) -> None:
    """A refused attempt, and one that ran out of time, are neither waits nor holds, and leave no gauge behind."""
    bench.flock(descriptor, LOCK_EX)
    assert run(bench, "flock --nonblock xtables.lock true") == 1
    process = bench.namespace.popen(bench.shell("iptables-legacy -w 1 -S\nexit $?"))
    until(lambda: bench.blocked() == 1)
    bench.settle()
    assert set(bench.waiting) == {"kube-proxy"}
    assert process.wait() == 4
    bench.settle()
    assert bench.waiting == {}
    assert bench.waited == {TESTER: 1}
    assert bench.held == {}
    assert set(bench.holding) == {TESTER}


def test_an_attempt_is_not_repeated_for_ever(bench: XtablesLockBench, descriptor: int) -> None:
    """A process that lives on after a refused attempt waits no longer when it has not tried again for a while."""
    other = os.open(bench.path, os.O_RDONLY)
    bench.flock(other, LOCK_EX)
    with pytest.raises(BlockingIOError):
        bench.flock(descriptor, LOCK_SH | LOCK_NB)
    bench.settle()
    assert set(bench.waiting) == {TESTER}
    bench.until(lambda: bench.waiting == {})
    os.close(other)
    begin = time.monotonic_ns()
    bench.flock(descriptor, LOCK_SH)
    bench.settle()
    assert bench.waits[-1].begin_ns >= begin


@pytest.mark.parametrize("kill", [False, True])
def test_an_exit_gives_the_lock_back(bench: XtablesLockBench, kill: bool) -> None:
    """A process that ends, or is killed, with the lock held it until then."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(write)
        with bench.namespace.enter():
            flock(os.open(bench.path, os.O_RDONLY), LOCK_EX)
        os.read(read, 1)
        os._exit(0)
    os.close(read)
    bench.until(lambda: set(bench.holding) == {TESTER})
    begin = time.monotonic_ns()
    if kill:
        os.kill(child, signal.SIGKILL)
    os.close(write)
    os.waitpid(child, 0)
    bench.settle()
    assert bench.held == {TESTER: 1}
    assert bench.holding == {}
    (hold,) = bench.holds
    assert hold.tgid == child
    assert begin <= hold.end_ns <= time.monotonic_ns()


def test_an_inherited_descriptor_keeps_the_lock(bench: XtablesLockBench) -> None:
    """The lock is held until the last of the processes that share the open file has closed it."""
    opened = os.open(bench.path, os.O_RDONLY)
    bench.flock(opened, LOCK_EX)
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(write)
        os.read(read, 1)
        os._exit(0)
    os.close(read)
    os.close(opened)
    bench.settle()
    assert bench.held == {}
    assert set(bench.holding) == {TESTER}
    begin = time.monotonic_ns()
    os.close(write)
    os.waitpid(child, 0)
    bench.settle()
    assert bench.held == {TESTER: 1}
    assert bench.holds[0].tgid == os.getpid()
    assert bench.holds[0].end_ns >= begin


def test_a_conversion_is_no_second_hold(bench: XtablesLockBench, descriptor: int) -> None:
    """Shared to exclusive and back is one hold, unless the lock was lost on the way."""
    for operation in (LOCK_SH, LOCK_EX, LOCK_EX, LOCK_SH):
        bench.flock(descriptor, operation)
    bench.settle()
    assert bench.waited == {TESTER: 1}
    assert bench.held == {}
    other = os.open(bench.path, os.O_RDONLY)
    bench.flock(other, LOCK_SH)
    with pytest.raises(BlockingIOError):
        bench.flock(descriptor, LOCK_EX | LOCK_NB)  # flock(2): the original lock is lost then
    bench.settle()
    assert bench.held == {TESTER: 1}
    os.close(other)


def test_the_file_counts_not_the_path(bench: XtablesLockBench) -> None:
    """A container's own mount of the lock file is the same lock."""
    mount = f"mkdir m && touch m/xtables.lock && mount --bind {bench.path} m/xtables.lock"
    script = f"unshare -m sh -c '{mount} && XTABLES_LOCKFILE=$PWD/m/xtables.lock {RESTORE}'"
    assert run(bench, script) == 0
    bench.settle()
    assert bench.waited == {"kube-proxy": 1} == bench.held
    assert bench.waits[0].inode == bench.path.stat().st_ino


def test_a_pod_s_lock_is_its_own(bench: XtablesLockBench, tmp_path: Path) -> None:
    """A lock that only another namespace uses does not count; the node's counts whoever takes it, but by no name."""
    own = tmp_path / "pod" / "xtables.lock"
    own.parent.mkdir()
    with Namespace("pod") as pod:

        def restore(path: Path) -> None:
            command = [*bench.shell(RESTORE)]
            command[1] = f"XTABLES_LOCKFILE={path}"
            assert pod.popen(command).wait() == 0

        restore(own)
        bench.settle()
        assert bench.waited == {} == bench.held
        assert run(bench, RESTORE) == 0
        restore(bench.path)
        bench.settle()
    assert bench.waited == {"kube-proxy": 1, "other": 1} == bench.held


def test_other_locks_are_not_looked_at(bench: XtablesLockBench, tmp_path: Path) -> None:
    """Other files' locks, and other kinds of locks on this one, are none of ours."""
    for name in ("xtables.lock.x", "ytables.lock", "lock"):
        with (tmp_path / name).open("w") as file:
            bench.flock(file.fileno(), LOCK_EX)
    with bench.path.open("r+") as file:
        bench.namespace.call(lambda: lockf(file, LOCK_EX))
        bench.flock(file.fileno(), LOCK_UN)
    bench.settle()
    assert bench.signal.records == []
    assert nobody_is_lost(bench)


def test_processes_that_are_gone_are_known(
    compiled: dict[str, Bytecode], namespace: Namespace, tmp_path: Path
) -> None:
    """With the rewrite signal's table of processes, who took the lock is named even when nobody of them runs any more."""
    (tmp_path / "rules").write_text(RULES)
    rewrites = RewriteBench(Compiler(Path("/sys/kernel/btf/vmlinux"), None).build(REWRITE_REQUEST), namespace)
    bench = XtablesLockBench(compiled["new"], namespace, tmp_path, rewrites.processes.consume)
    try:
        runs = 7
        process = namespace.popen(bench.shell(f"for i in $(seq {runs}); do dash -c '{RESTORE}; :'; done"))
        assert process.wait() == 0
        bench.settle()
        assert bench.waited == {"kube-proxy": runs} == bench.held
        rewrites.settle()
        assert rewrites.outcomes(writer="kube-proxy") == {"committed": runs}
    finally:
        bench.close()
        rewrites.close()


def test_a_hold_from_before_us_is_not_guessed(
    bytecode: Bytecode, namespace: Namespace, tmp_path: Path
) -> None:
    """Who held the lock before kptrace began is not counted; who waits for it then holds it is."""
    (tmp_path / "rules").write_text(RULES)
    path = tmp_path / "xtables.lock"
    path.touch()
    opened = os.open(path, os.O_RDONLY)
    namespace.call(lambda: flock(opened, LOCK_EX))
    bench = XtablesLockBench(bytecode, namespace, tmp_path)
    try:
        process = start(bench, RESTORE)
        until(lambda: bench.blocked() == 1)
        os.close(opened)
        assert finish(bench, process) == 0
        assert bench.waited == {"kube-proxy": 1} == bench.held
    finally:
        bench.close()


def test_nothing_stays_behind(bytecode: Bytecode, namespace: Namespace, tmp_path: Path) -> None:
    """Closing detaches, twice is once, and what was counted is still there."""
    names = ("lock_decided", "enter_flock", "exit_flock")
    before = program_ids(names)
    bench = XtablesLockBench(bytecode, namespace, tmp_path)
    (tmp_path / "rules").write_text(RULES)
    own = program_ids(names) - before
    assert len(own) == len(names)
    assert run(bench, RESTORE) == 0
    bench.settle()
    bench.close()
    bench.signal.close()
    until(lambda: not program_ids(names) & own)  # the kernel frees a raw tracepoint's program a moment later
    assert bench.waited == {"kube-proxy": 1} == bench.held
    assert nobody_is_lost(bench)
