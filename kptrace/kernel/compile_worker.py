# SPDX-License-Identifier: Apache-2.0
"""One compile child at a time, and the questions put to it: a line each way, many questions to one child.

Starting Python, reading the kernel's BTF and mapping LLVM take longer than many a source's compilation, so a child stays
for the next question. One that ends early takes only the question down that it was asked.
"""

import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

from kptrace.model.errors import CompileError, UnsupportedError

_TIMEOUT_SECONDS = 120
_END_SECONDS = 5


@dataclass(frozen=True, slots=True)
class _Child:
    process: subprocess.Popen[str]
    questions: IO[str]
    answers: IO[str]
    errors: IO[str]


@contextmanager
def _compile_child(argv: list[str]) -> Iterator[_Child]:
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("the child's pipes were asked for")
        try:
            yield _Child(process, process.stdin, process.stdout, errors)
        finally:
            try:
                process.communicate(timeout=_END_SECONDS)  # closes its stdin, which ends it
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()


class CompileWorker:
    """Asks a compile child, which is started with the first question and after one that it did not survive."""

    def __init__(
        self, btf: Path, *, python: str = sys.executable, timeout_seconds: float = _TIMEOUT_SECONDS
    ) -> None:
        """Compile for the kernel whose BTF is the file `btf`."""
        self._argv = [python, "-m", "kptrace.kernel.compile_child", str(btf)]
        self._timeout_seconds = timeout_seconds
        self._child: _Child | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        """The worker itself, whose child ends with the block."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the child."""
        self._end()

    def ask(self, question: Mapping[str, Any]) -> str:
        """The child's answer, as JSON.

        Raises:
            CompileError: the child failed, or took too long.
            UnsupportedError: the kernel's BTF lacks a fact of the question.
        """
        if self._child is None:
            self._child = self._stack.enter_context(_compile_child(self._argv))
        child = self._child
        late = threading.Event()

        def give_up() -> None:
            late.set()
            child.process.kill()

        timer = threading.Timer(self._timeout_seconds, give_up)
        timer.start()
        try:
            child.questions.write(json.dumps(question) + "\n")
            child.questions.flush()
            answer = child.answers.readline()
        except BrokenPipeError:
            answer = ""  # it ended before it read: its exit code and its last words say why
        finally:
            timer.cancel()
        if not answer.endswith("\n"):
            raise self._post_mortem(child, late=late.is_set())
        if lacking := json.loads(answer).get("lacking"):
            raise UnsupportedError(
                f"this kernel's BTF has no {lacking}", remedy="use another mechanism, or kernel"
            )
        return answer

    def kill(self) -> None:
        """End the child, from any thread: a question that it was asked fails."""
        child = self._child
        if child is not None:
            child.process.kill()

    def _post_mortem(self, child: _Child, *, late: bool) -> CompileError:
        code = child.process.wait(_END_SECONDS)
        child.errors.seek(0)
        text = child.errors.read()
        self._end()
        if late:
            return CompileError(
                f"the compile child did not answer within {self._timeout_seconds:g} s",
                remedy="give the daemon more CPU",
            )
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        telling = next(
            (line for line in lines if "error:" in line), lines[-1] if lines else "it said nothing"
        )
        missing = "No module named 'bcc'" in text
        return CompileError(
            f"the compile child failed ({code}): {telling}",
            remedy="install Debian's python3-bpfcc" if missing else "report this as a bug",
        )

    def _end(self) -> None:
        self._child = None
        self._stack.close()
