# SPDX-License-Identifier: Apache-2.0
"""The four tiers, golden files and the seed of the property tests.

A test belongs to the tier whose folder it is in. A tier that the machine cannot run is skipped with its
reason, and so are single tests by `require_tier`; where the environment variable KPTRACE_REQUIRE (`native,vm`)
names the tier, every such skip is a failure.
"""

import os
import random
import shutil
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
TIERS = ("unit", "native", "vm", "cluster")


def required_tiers() -> frozenset[str]:
    """The tiers that may not be skipped."""
    names = frozenset(filter(None, os.environ.get("KPTRACE_REQUIRE", "").split(",")))
    if unknown := names - set(TIERS):
        raise pytest.UsageError(f"KPTRACE_REQUIRE names no tier: {', '.join(sorted(unknown))}")
    return names


def missing_for(tier: str) -> str:
    """Why this machine cannot run a tier; empty if it can."""
    if tier != "unit" and os.geteuid() != 0:
        return "needs root"
    if tier == "vm" and shutil.which("qemu-system-x86_64") is None:
        return "needs qemu-system-x86_64"
    if tier == "cluster" and shutil.which("kube-apiserver") is None:
        return "needs kube-apiserver"
    return ""


def tier_of(item: pytest.Item) -> str:
    """The tier that a test's folder gives it."""
    path = item.path
    return path.relative_to(TESTS).parts[0] if path.is_relative_to(TESTS) else ""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of this test suite."""
    parser.addoption("--update-golden", action="store_true", help="rewrite golden files instead of comparing")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Give the property tests a new seed, unless one was asked for."""
    if getattr(config.option, "hypothesis_seed", None) is None:
        config.option.hypothesis_seed = random.randrange(2**32)
    required_tiers()


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Say how to repeat this run."""
    seed = config.option.hypothesis_seed
    return [
        f"hypothesis seed: {seed} (repeat by --hypothesis-seed={seed})",
        f"required tiers: {', '.join(sorted(required_tiers())) or 'none'}",
    ]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test with its tier; cheap tiers run first."""
    for item in items:
        if (tier := tier_of(item)) in TIERS:
            item.add_marker(tier)
    items.sort(key=lambda item: TIERS.index(tier_of(item)) if tier_of(item) in TIERS else len(TIERS))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test whose tier this machine cannot run."""
    if reason := missing_for(tier_of(item)):
        pytest.skip(reason)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turn every skip in a required tier into a failure."""
    report = yield
    tier = tier_of(item)
    if report.skipped and not hasattr(report, "wasxfail") and tier in required_tiers():
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        report.outcome = "failed"
        report.longrepr = f"KPTRACE_REQUIRE names the {tier} tier, so this is no skip: {reason}"
    return report


@pytest.fixture
def require_tier() -> Callable[[str], None]:
    """Skip the running test unless this machine can run the tier that is given."""

    def require(tier: str) -> None:
        if reason := missing_for(tier):
            (pytest.fail if tier in required_tiers() else pytest.skip)(f"{tier}: {reason}")

    return require


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compare text with `golden/NAME` beside the test file, or rewrite it under --update-golden (`make golden`)."""

    def compare(name: str, text: str) -> None:
        path = request.path.parent / "golden" / name
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert path.exists(), f"{path} is missing: make golden"
        assert text == path.read_text(encoding="utf-8"), f"{path} differs: make golden, then review its diff"

    return compare
