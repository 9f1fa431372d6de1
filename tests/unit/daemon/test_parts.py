# SPDX-License-Identifier: Apache-2.0
"""Which parts a daemon starts: alternatives in order, everything else side by side, and what it says of the rest."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from kptrace.daemon import parts as parts_module
from kptrace.daemon.loop import Loop
from kptrace.daemon.part import Node, Part, Running
from kptrace.daemon.parts import Parts
from kptrace.daemon.settings import Settings
from kptrace.kernel.bytecode import Bytecode
from kptrace.kernel.compile import Request
from kptrace.model.errors import CompileError, KernelError, PrivilegeError, UnsupportedError
from kptrace.model.metrics import MetricFamily, MetricSpec
from kptrace.model.signal import MechanismState, State

BRACKET, FENTRY, REWRITE = ("lookup", "bracket"), ("lookup", "fentry"), ("rewrite", "tracepoint")


class Fake:
    """A running signal."""

    def __init__(self, signal: str, mechanism: str) -> None:
        self.name = signal
        self._row = MechanismState(signal, mechanism, State.ACTIVE)

    def describe(self) -> Sequence[MetricSpec]:
        """None."""
        return ()

    def families(self) -> Iterable[MetricFamily]:
        """None."""
        return ()

    def states(self) -> Sequence[MechanismState]:
        """One row."""
        return [self._row]

    def status(self, *, names: bool) -> Mapping[str, object]:
        """Whether names are allowed."""
        return {f"{self.name} names": names}

    def losses(self) -> Mapping[tuple[str, str], int]:
        """Some."""
        return {(self.name, "ring_full"): 7}


class Bench:
    """Parts whose start is recorded, and may be made to fail."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.errors: dict[str, Exception] = {}

    def part(self, signal: str, mechanism: str, *, alternative: bool = False, disabled: str = "") -> Part:
        """A part that writes down what happens to it."""

        def start(node: Node, _code: Bytecode) -> Running:
            node.stack.callback(self.events.append, f"close {mechanism}")
            if mechanism in self.errors:
                raise self.errors[mechanism]
            self.events.append(f"start {mechanism}")
            return Fake(signal, mechanism)

        return Part(signal, mechanism, Request(mechanism), start, lambda _: disabled, alternative)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Nothing of this machine: no capability is missing, and what compiles is written down too."""
    made = Bench()

    def build_each(_compiler: object, requests: Sequence[Request]) -> list[Bytecode | CompileError]:
        made.events.append("compile " + " ".join(request.source for request in requests))
        broken = made.errors
        return [
            error if isinstance(error := broken.get(request.source), CompileError) else Bytecode({}, {}, {})
            for request in requests
        ]

    monkeypatch.setattr(parts_module.Compiler, "build_each", build_each)
    monkeypatch.setattr(parts_module, "missing_capabilities", lambda *_: ())
    monkeypatch.setattr(parts_module, "probe", lambda *_args, **_kwargs: {})
    return made


@pytest.fixture
def start(bench: Bench) -> Iterator[Callable[..., Parts]]:
    """Start a daemon's parts with some settings."""
    made: list[Parts] = []

    def build(parts: Iterable[Part], **settings: object) -> Parts:
        wanted = {"identity": "none", "cache_dir": None, **settings}
        made.append(Parts(Settings(**wanted), Loop(), parts))  # type: ignore[arg-type]  # any setting
        made[-1].start()
        return made[-1]

    yield build
    for each in made:
        each.close()


def three(bench: Bench) -> tuple[Part, ...]:
    """Two alternatives and something else."""
    return (
        bench.part(*BRACKET, alternative=True),
        bench.part(*FENTRY, alternative=True),
        bench.part(*REWRITE),
    )


def row(parts: Parts, key: tuple[str, str]) -> MechanismState:
    """The one state of a mechanism."""
    (found,) = [state for state in parts.states() if (state.signal, state.mechanism) == key]
    return found


def test_the_first_alternative_that_works_is_taken(bench: Bench, start: Callable[..., Parts]) -> None:
    """What is not needed is not even compiled; the others start side by side."""
    parts = start(three(bench))
    assert bench.events == ["compile bracket tracepoint", "start bracket", "start tracepoint"]
    assert parts.ready
    assert row(parts, BRACKET).state is State.ACTIVE
    assert parts.reports.losses() == {
        ("daemon", "callback_failed"): 0, ("lookup", "ring_full"): 7, ("rewrite", "ring_full"): 7
    }  # fmt: skip


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (KernelError("bpf: EPERM", errno=1), "attach_refused"),
        (PrivilegeError("bpf: EPERM"), "attach_refused"),
        (UnsupportedError("no such hook"), "unsupported"),
        (CompileError("no bcc"), "compile_failed"),
    ],
)
def test_the_next_alternative_follows(
    bench: Bench, start: Callable[..., Parts], error: Exception, reason: str
) -> None:
    """Where the first is refused its state says why, what it had opened is closed at once, and the next one runs."""
    bench.errors["bracket"] = error
    parts = start(three(bench))
    assert [event for event in bench.events if event.startswith("start")] == [
        "start tracepoint",
        "start fentry",
    ]
    assert ("close bracket" in bench.events) == (reason != "compile_failed")
    found = row(parts, BRACKET)
    assert (found.state, found.reason) == (State.UNAVAILABLE, reason)
    assert str(error) in found.detail
    assert row(parts, FENTRY).state is State.ACTIVE


def test_the_mechanism_that_was_asked_for_must_work(bench: Bench, start: Callable[..., Parts]) -> None:
    """A user who names one mechanism does not silently get another."""
    bench.errors["bracket"] = KernelError("link: EBUSY", errno=16)
    with pytest.raises(UnsupportedError, match="bracket: link: EBUSY"):
        start(three(bench), lookup_mechanism="bracket")


def test_a_disabled_part_says_so(bench: Bench, start: Callable[..., Parts]) -> None:
    """What the user switched off is off, for the reason that he gave."""
    parts = start([bench.part(*REWRITE, disabled="--no-rewrites"), bench.part(*BRACKET, alternative=True)])
    found = row(parts, REWRITE)
    assert (found.state, found.reason, found.detail) == (State.OFF, "disabled", "--no-rewrites")
    assert bench.events == ["compile bracket", "start bracket"]


def test_a_daemon_that_can_measure_nothing_does_not_start(bench: Bench, start: Callable[..., Parts]) -> None:
    """The error names every mechanism and what the kernel said of it."""
    for each in ("bracket", "fentry", "tracepoint"):
        bench.errors[each] = KernelError(f"{each} refused", errno=1)
    with pytest.raises(UnsupportedError, match=r"bracket refused.*fentry refused.*tracepoint refused"):
        start(three(bench))


@pytest.mark.parametrize("allowed", [True, False])
def test_names_are_shown_only_where_allowed(bench: Bench, start: Callable[..., Parts], allowed: bool) -> None:
    """Every running signal has its sections in /status, and hears whether it may show names."""
    sections = start(three(bench), status_names=allowed).reports.sections(names=allowed)
    assert sections["lookup names"] is sections["rewrite names"] is allowed
    assert sections["losses"] == {"daemon/callback_failed": 0, "lookup/ring_full": 7, "rewrite/ring_full": 7}


def test_a_part_that_loads_nothing_is_not_compiled(bench: Bench, start: Callable[..., Parts]) -> None:
    """It starts in its turn, beside others that are."""
    nothing = replace(bench.part("programming", "watch"), request=None)
    parts = start([bench.part(*BRACKET, alternative=True), nothing, bench.part(*REWRITE)])
    assert bench.events == ["compile bracket tracepoint", "start bracket", "start watch", "start tracepoint"]
    assert row(parts, ("programming", "watch")).state is State.ACTIVE


def test_a_missing_compiler_is_the_reason(bench: Bench, start: Callable[..., Parts]) -> None:
    """Where nothing runs for want of BCC, that is the error, and not that the kernel could do nothing."""
    bench.errors = {
        "bracket": CompileError("no bcc"), "fentry": UnsupportedError("no"), "tracepoint": CompileError("no bcc")
    }  # fmt: skip
    with pytest.raises(CompileError, match="no bcc"):
        start(three(bench))


def test_everything_is_closed_in_reverse_order(bench: Bench, tmp_path: Path) -> None:
    """What started last is let go first, once."""
    parts = Parts(Settings(identity="none", cache_dir=None), Loop(), three(bench))
    parts.start()
    parts.close()
    parts.close()
    assert bench.events[-2:] == ["close tracepoint", "close bracket"]
    assert bench.events.count("close bracket") == 1
