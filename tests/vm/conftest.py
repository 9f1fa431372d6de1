# SPDX-License-Identifier: Apache-2.0
"""Tests inside a test machine (`make test-vm`): which kernel it has, and what that kernel is promised to do.

A test that is about a mechanism is marked with it, and deselected on kernels where the support table does not promise
it: there is nothing to test. So a skip here is a failure, unless the test proved its reason by `lacking`.
"""

import json
import os
import platform
import subprocess
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

import pytest

from tools.vm.matrix import KERNELS, Kernel
from tools.vm.support import promised_features, promised_mechanisms

_NAME = os.environ.get("KPTRACE_VM_KERNEL", "")
_PROVEN = "the kernel lacks it: "
# Emulated: what takes a second on a node may take twenty here, and two machines share the host.
_SECONDS = 600


def _kernel() -> Kernel:
    return next(each for each in KERNELS if each.name == _NAME)


def _mechanisms() -> list[tuple[str, str]]:
    # Only inside is kptrace surely installed.
    from kptrace.kernel.features import TABLE
    from kptrace.signals.mechanisms import MECHANISMS

    return promised_mechanisms(_kernel(), platform.release(), TABLE, MECHANISMS)


def _something(promised: list[tuple[str, str]]) -> bool:
    """Whether anything of the kernel is to be measured: what needs nothing of it does not keep a daemon alive alone."""
    from kptrace.signals.mechanisms import MECHANISMS

    return any(row.needs and (row.signal, row.name) in promised for row in MECHANISMS)


def pytest_configure(config: pytest.Config) -> None:
    """Register this folder's markers."""
    config.addinivalue_line(
        "markers", "promised(signal, mechanism): only where the support table promises it"
    )
    config.addinivalue_line("markers", "unpromised(signal, mechanism): only where it does not")
    config.addinivalue_line(
        "markers", "icount: only where the clock counts instructions (tools/vm/run.py --icount)"
    )
    config.addinivalue_line(
        "markers",
        "promised_something(yes): only where it promises any mechanism that needs the kernel, or none",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what this kernel is not promised to do; outside of a test machine, skip everything."""
    here = [item for item in items if item.path.is_relative_to(Path(__file__).parent)]
    if not _NAME:
        for item in here:
            item.add_marker(pytest.mark.skip(reason="runs inside test machines: make test-vm"))
        return
    promised = _mechanisms()
    something = _something(promised)
    dropped = []
    for item in here:
        item.add_marker(pytest.mark.timeout(_SECONDS))
        wanted = all(mark.args in promised for mark in item.iter_markers("promised"))
        unwanted = any(mark.args in promised for mark in item.iter_markers("unpromised"))
        other = any(mark.args[0] != something for mark in item.iter_markers("promised_something"))
        # Only such a machine has one CPU.
        uncounted = item.get_closest_marker("icount") is not None and os.cpu_count() != 1
        if not wanted or unwanted or other or uncounted:
            dropped.append(item)
    config.hook.pytest_deselected(items=dropped)
    items[:] = [item for item in items if item not in dropped]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turn a skip without proof into a failure."""
    report = yield
    if _NAME and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if _PROVEN not in reason:
            report.outcome = "failed"
            report.longrepr = f"no skip without proof: {reason}"
    return report


@pytest.fixture(scope="session")
def kernel() -> Kernel:
    """The line of the support table that this machine is."""
    return _kernel()


@pytest.fixture(scope="session")
def features(kernel: Kernel) -> dict[str, bool]:
    """For each feature whether this kernel must have it."""
    from kptrace.kernel.features import TABLE

    return promised_features(kernel, platform.release(), TABLE)


@pytest.fixture(scope="session")
def mechanisms() -> list[tuple[str, str]]:
    """The mechanisms that must work on this kernel."""
    return _mechanisms()


@pytest.fixture(scope="session")
def checked() -> Any:
    """What `kptrace check --json` of the image says here."""
    done = subprocess.run(["kptrace", "check", "--json"], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return json.loads(done.stdout)


@pytest.fixture
def lacking() -> Callable[[str], NoReturn]:
    """Skip because this kernel was built without something; only after the test has seen that it is so."""

    def skip(proof: str) -> NoReturn:
        pytest.skip(_PROVEN + proof)

    return skip


@pytest.fixture
def namespace() -> Iterator[Any]:
    """A network namespace of the test's own."""
    from kptrace.experiments.netns import Namespace

    with Namespace("vm") as made:
        yield made


@pytest.fixture
def daemon(namespace: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Start the image's daemon on the test's namespace, every packet sampled; it ends with the test."""
    from tests.vm.daemons import running

    with ExitStack() as stack:
        yield lambda *more: stack.enter_context(running(namespace, tmp_path, "--sample", "all", *more))
