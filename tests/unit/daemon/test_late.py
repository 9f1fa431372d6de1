# SPDX-License-Identifier: Apache-2.0
"""Parts that nothing waits for: when they start, what is said of them meanwhile, and how they end."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from kptrace.daemon import late as late_module
from kptrace.daemon.loop import Loop
from kptrace.daemon.part import Node, Part, Running
from kptrace.daemon.parts import Parts
from kptrace.daemon.settings import Settings
from kptrace.kernel.bytecode import Bytecode
from kptrace.kernel.compile import Compiler, Request
from kptrace.kernel.support import Support
from kptrace.model.errors import CompileError, KernelError
from kptrace.model.signal import MechanismState, State
from tests.unit.daemon.test_parts import Bench, Fake, bench

__all__ = ["bench"]

FENTRY, KPROBE = ("rewrite_phases", "fentry"), ("rewrite_phases", "kprobe")
PATIENCE_SECONDS = 20.0


class Story:
    """One daemon's parts with two late alternatives, and the features that the slow probe finds."""

    def __init__(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bench = bench
        self.loop = Loop()
        self.features: Mapping[str, Support] = {}
        self.may_start = threading.Event()
        self.may_start.set()
        monkeypatch.setattr(late_module, "probe", lambda _host: self.features)

        def build(_compiler: object, request: Request) -> Bytecode:
            bench.events.append(f"compile {request.source}")
            return Bytecode({}, {}, {})

        monkeypatch.setattr(Compiler, "build", build)
        rewrite = bench.part("rewrite", "tracepoint")
        self.parts = Parts(
            Settings(identity="none", cache_dir=None),
            self.loop,
            [rewrite, *map(self._part, (FENTRY, KPROBE))],
        )

    def _part(self, row: tuple[str, str]) -> Part:
        signal, mechanism = row

        def start(node: Node, _code: Bytecode) -> Running:
            node.stack.callback(self.bench.events.append, f"close {mechanism}")
            assert self.may_start.wait(PATIENCE_SECONDS)
            if mechanism in self.bench.errors:
                raise self.bench.errors[mechanism]
            self.bench.events.append(f"start {mechanism}")
            return Fake(signal, mechanism)

        return Part(signal, mechanism, Request(mechanism), start, alternative=True, late=True)

    def row(self, key: tuple[str, str]) -> MechanismState:
        """The one state of a mechanism."""
        (found,) = [state for state in self.parts.states() if (state.signal, state.mechanism) == key]
        return found

    def run_until(self, condition: Callable[[], bool]) -> None:
        """Run the loop until something is so."""
        ends = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            assert time.monotonic() < ends, self.parts.states()
            self.loop.run_once(0.05)


@pytest.fixture
def story(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Iterator[Story]:
    """Parts that were not started yet."""
    made = Story(bench, monkeypatch)
    yield made
    made.may_start.set()
    made.parts.close()


def test_nothing_waits_for_a_late_part(story: Story) -> None:
    """The daemon is ready while a late part is being attached; it counts from then on, and the other is not needed."""
    story.may_start.clear()
    story.parts.start()
    assert story.parts.ready
    assert (story.row(FENTRY).state, story.row(FENTRY).reason) == (State.OFF, "starting")
    assert ("rewrite_phases", "ring_full") not in story.parts.reports.losses()
    story.may_start.set()
    story.run_until(lambda: story.row(FENTRY).state is State.ACTIVE)
    assert story.parts.reports.losses()["rewrite_phases", "ring_full"] == 7
    assert (story.row(KPROBE).state, story.row(KPROBE).reason) == (State.OFF, "not_needed")
    assert story.row(KPROBE).detail == "fentry is in use"
    assert "start kprobe" not in story.bench.events


def test_what_the_probe_refuses_is_not_even_compiled(story: Story) -> None:
    """The first alternative whose features are there is taken; the other's row has the probe's reason."""
    story.features = {"fentry": Support.no("eperm", "bpf: EPERM")}
    story.parts.start()
    story.run_until(lambda: story.row(KPROBE).state is State.ACTIVE)
    found = story.row(FENTRY)
    assert (found.state, found.reason, found.detail) == (State.UNAVAILABLE, "eperm", "fentry: bpf: EPERM")
    assert "compile fentry" not in story.bench.events


def test_where_all_are_refused_the_rest_goes_on(story: Story) -> None:
    """Each mechanism is unavailable for its own reason, and no other signal hears of it."""
    story.features = {"fentry": Support.no("eperm", "bpf: EPERM")}
    story.bench.errors = {"kprobe": KernelError("perf_event_open: ENOENT", errno=2)}
    story.parts.start()
    story.run_until(lambda: story.row(KPROBE).state is State.UNAVAILABLE)
    assert story.row(FENTRY).state is State.UNAVAILABLE
    assert (story.row(KPROBE).reason, story.row(KPROBE).detail) == (
        "attach_refused", "perf_event_open: ENOENT"
    )  # fmt: skip
    assert story.row(("rewrite", "tracepoint")).state is State.ACTIVE
    assert "close kprobe" in story.bench.events


def test_the_end_lets_late_parts_go_first(story: Story) -> None:
    """They may use what the others have."""
    story.parts.start()
    story.run_until(lambda: story.row(FENTRY).state is State.ACTIVE)
    story.parts.close()
    assert story.bench.events[-2:] == ["close fentry", "close tracepoint"]


def test_a_part_that_is_being_attached_at_the_end_is_let_go_too(story: Story) -> None:
    """The end waits for what is half attached, and starts nothing more."""
    story.may_start.clear()
    story.bench.errors = {"fentry": KernelError("link: EBUSY", errno=16)}
    story.parts.start()
    ends = time.monotonic() + PATIENCE_SECONDS
    while "compile fentry" not in story.bench.events:
        assert time.monotonic() < ends
        time.sleep(0.01)
    threading.Timer(0.1, story.may_start.set).start()
    story.parts.close()
    assert "close fentry" in story.bench.events
    assert "compile kprobe" not in story.bench.events


def test_a_compilation_can_be_given_up(tmp_path: Path) -> None:
    """Whoever waits gets an error at once, and nothing is compiled afterwards."""
    sleepy = tmp_path / "python"
    sleepy.write_text("#!/bin/sh\nexec sleep 60\n")
    sleepy.chmod(0o755)
    btf = tmp_path / "btf"
    btf.write_bytes(b"")
    compiler = Compiler(btf, None, python=str(sleepy))
    answers: list[object] = []
    thread = threading.Thread(target=lambda: answers.extend(compiler.build_each([Request("process.bpf.c")])))
    thread.start()
    ends = time.monotonic() + PATIENCE_SECONDS
    while thread.is_alive() and time.monotonic() < ends:
        compiler.abandon()
        thread.join(0.05)
    assert isinstance(answers[0], CompileError)
    (again,) = compiler.build_each([Request("process.bpf.c")])
    assert isinstance(again, CompileError)
