# SPDX-License-Identifier: Apache-2.0
"""Real kernel parts for the native tests: one compilation a run, one namespace a test."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kptrace.experiments.netns import Namespace
from kptrace.kernel.bytecode import Bytecode
from kptrace.kernel.compile import Compiler
from kptrace.signals.lookup_kernel import REQUEST
from tests.native.lookup_bench import LookupBench


@pytest.fixture(scope="session")
def lookup_bytecode() -> Bytecode:
    """The lookup programs, compiled once."""
    return Compiler(Path("/sys/kernel/btf/vmlinux"), None).build(REQUEST)


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    """A network namespace of the test's own."""
    with Namespace("test") as made:
        yield made


@pytest.fixture
def measure(lookup_bytecode: Bytecode, namespace: Namespace) -> Iterator[Callable[..., LookupBench]]:
    """Start the lookup signal on the test's namespace, every packet sampled unless told otherwise."""
    started: list[LookupBench] = []

    def start(**options: object) -> LookupBench:
        started.append(LookupBench(lookup_bytecode, namespace, **options))
        return started[-1]

    yield start
    for each in started:
        each.close()
