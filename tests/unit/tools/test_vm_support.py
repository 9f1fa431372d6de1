# SPDX-License-Identifier: Apache-2.0
"""The table of supported kernels, what it promises, and docs/support.md."""

from pathlib import Path

import pytest

from kptrace.kernel.features import TABLE
from kptrace.signals.mechanisms import MECHANISMS
from tools.vm.errors import VmError
from tools.vm.matrix import KERNELS, Kernel, select
from tools.vm.support import page, promised_features, promised_mechanisms, version_of

DOCS = Path(__file__).parents[3] / "docs/support.md"


def kernel(name: str) -> Kernel:
    """A line of the table."""
    return next(each for each in KERNELS if each.name == name)


def promised(name: str) -> set[tuple[str, str]]:
    """What a kernel of the table is promised to do."""
    return set(promised_mechanisms(kernel(name), kernel(name).version, TABLE, MECHANISMS))


def test_docs_have_every_kernel_and_promise(request: pytest.FixtureRequest) -> None:
    """docs/support.md is what the tables say; `make golden` writes it anew."""
    text = page(TABLE, MECHANISMS)
    if request.config.getoption("--update-golden"):
        DOCS.write_text(text, encoding="utf-8")
    assert DOCS.read_text(encoding="utf-8") == text, "make golden, then review the diff"


def test_what_is_refused_is_a_feature() -> None:
    """A misspelt feature would promise what the kernel refuses."""
    names = {feature.name for feature in TABLE}
    assert {name for each in KERNELS for name in each.refuses} <= names


def test_every_kernel_measures_look_ups() -> None:
    """A kernel without any is not worth its line; only a lockdown of an old one leaves none."""
    without = {each.name for each in KERNELS if "lookup" not in {signal for signal, _ in promised(each.name)}}
    assert without == {"6.1-lockdown"}


def test_promises_follow_versions_and_boot_options() -> None:
    """Brackets from 6.4 on, modules' BTF for fentry from 5.11 on, no kprobes where a lockdown refuses them."""
    assert ("lookup", "bracket") not in promised("6.1")
    assert ("lookup", "bracket") in promised("6.12-lockdown")
    assert ("lookup", "fentry") not in promised("5.10")
    assert {("lookup", "fentry"), ("lookup", "kprobe")} <= promised("6.1")
    assert ("lookup", "kprobe") not in promised("6.12-lockdown")


def test_a_feature_without_a_version_is_always_promised() -> None:
    """Capabilities are no matter of the kernel's age."""
    assert promised_features(kernel("5.10"), "4.19.1", TABLE)["capabilities"]


@pytest.mark.parametrize(
    ("release", "version"),
    [("6.12.107+deb13-amd64", (6, 12)), ("7.2", (7, 2)), ("5.10.0-32-rt-amd64", (5, 10))],
)
def test_versions_are_the_first_two_numbers(release: str, version: tuple[int, int]) -> None:
    """Whatever a distribution appends."""
    assert version_of(release) == version


def test_a_release_without_numbers_is_none() -> None:
    """It is said, not guessed."""
    with pytest.raises(ValueError, match="kernel's release"):
        version_of("linux")


def test_kernels_are_chosen_by_name_or_for_a_change() -> None:
    """Names in the order given, else those of CI, else all; another name lists the right ones."""
    assert [each.name for each in select(["newest", "5.10"])] == ["newest", "5.10"]
    assert all(each.ci for each in select([])) and len(select([])) < len(KERNELS)
    assert select([], everything=True) == list(KERNELS)
    with pytest.raises(VmError, match=r"4\.4.*one of: 5\.10"):
        select(["4.4"])
