# SPDX-License-Identifier: Apache-2.0
"""The harness of the test machines, as far as it needs none."""

from pathlib import Path

import pytest

from tools.vm.boot import Machine, command_line
from tools.vm.cli import script_of
from tools.vm.kernels import Installed
from tools.vm.mirror import find_mirror, kernel_parts
from tools.vm.suite import Result, read_junit, summary

KERNEL = Installed("6.12.1-amd64", Path("/cache/vmlinuz"))
JUNIT = """\
<testsuites><testsuite>
<testcase name="good"/>
<testcase name="bad"><failure message="AssertionError: 1 != 2&#10;more"/></testcase>
<testcase name="broken"><error message="failed on setup"/></testcase>
<testcase name="proven"><skipped message="the kernel lacks it: x"/></testcase>
</testsuite></testsuites>
"""


def arguments(machine: Machine) -> list[str]:
    """The command of a machine."""
    return command_line(KERNEL, Path("/cache/disk.img"), Path("/out"), machine)


def test_errors_count_as_failures_and_are_named(tmp_path: Path) -> None:
    """A test that broke in its setup did not pass."""
    path = tmp_path / "junit.xml"
    path.write_text(JUNIT)
    passed, failed, skipped, lines = read_junit(path)
    assert (passed, failed, skipped) == (1, 2, 1)
    assert lines.splitlines() == ["  bad: AssertionError: 1 != 2", "  broken: failed on setup"]


def test_a_kernel_without_results_is_a_failure() -> None:
    """It counts as one even though no test of its failed."""
    results = [Result("a", passed=3, skipped=1), Result("b", trouble="did not boot")]
    assert summary(results) == "3 passed, 1 failed, 1 skipped"
    assert [result.good for result in results] == [True, False]


def test_one_word_is_a_script_and_several_are_quoted() -> None:
    """So that a quoted line may have pipes, and an argument spaces."""
    assert script_of(["a | b"]) == "a | b"
    assert script_of(["echo", "a b"]) == "echo 'a b'"


def test_icount_is_one_cpu() -> None:
    """With two, instructions are no time."""
    argv = arguments(Machine(cpus=4, icount=True))
    assert argv[argv.index("--cpus") + 1] == "1"
    assert "--qemu-opts=-icount shift=0,sleep=off" in argv


def test_emulated_cpus_share_a_thread_unless_asked_for() -> None:
    """Without it a boot of 7.2 may panic."""
    single = "--qemu-opts=-accel tcg,thread=single"
    assert single in arguments(Machine())
    assert single not in arguments(Machine(parallel=True))
    assert "--disable-kvm" not in arguments(Machine(kvm=True))


@pytest.mark.parametrize(
    ("targets", "found"),
    [
        ("Debian|Debian|http://mirror/debian", "http://mirror/debian"),
        ("Debian|Debian-Security|http://s\nDebian|Debian|http://m", "http://m"),
        ("", ""),
    ],
)
def test_the_mirror_is_the_archive_s(targets: str, found: str) -> None:
    """Not that of security updates, nor another distribution's."""
    assert find_mirror(targets) == found


def test_a_kernel_s_parts_are_found_in_its_dependencies() -> None:
    """One package before 6.19, three since; no headers, no tools."""
    assert kernel_parts("Depends: linux-image-6.1.0-50-amd64 (= 6.1.1), kmod") == {
        "linux-image-6.1.0-50-amd64"
    }
    assert kernel_parts("linux-binary-7.2-amd64, linux-modules-7.2-amd64, linux-base (>= 4)") == {
        "linux-binary-7.2-amd64",
        "linux-modules-7.2-amd64",
    }
