# SPDX-License-Identifier: Apache-2.0
"""Questions to a compile child that answers, lacks, fails, or is silent."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kptrace.kernel.compile_worker import CompileWorker
from kptrace.model.errors import CompileError, UnsupportedError

_CHILD = """\
#!{python}
import json, os, sys, time
for line in sys.stdin:
    question = json.loads(line)
    match question["do"]:
        case "answer": print(json.dumps({{"pid": os.getpid()}}), flush=True)
        case "lack": print(json.dumps({{"lacking": "offset:a:b"}}), flush=True)
        case "say": sys.exit(question["text"])
        case "die": os.abort()
        case "sleep": time.sleep(60)
"""

Start = Callable[..., CompileWorker]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """A worker whose Python is a script that does as it is told."""
    python = tmp_path / "python"
    python.write_text(_CHILD.format(python=sys.executable), encoding="utf-8")
    python.chmod(0o755)
    return lambda **options: CompileWorker(Path("/btf"), python=str(python), **options)


def test_one_child_answers_many_questions_and_ends_with_the_block(start: Start) -> None:
    """Two questions have the same child's answer, and afterwards that child is gone."""
    with start() as worker:
        answers = {worker.ask({"do": "answer"}) for _ in range(3)}
    (answer,) = answers
    pid = int(answer.strip().removeprefix('{"pid": ').removesuffix("}"))
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_lacking_fact_is_named_and_the_child_stays(start: Start) -> None:
    """A kernel without a fact is an unsupported one, which does not cost the child."""
    with start() as worker:
        before = worker.ask({"do": "answer"})
        with pytest.raises(UnsupportedError, match="offset:a:b"):
            worker.ask({"do": "lack"})
        assert worker.ask({"do": "answer"}) == before


@pytest.mark.parametrize(
    ("question", "message", "remedy"),
    [
        ({"do": "say", "text": "note\nx.c:3: error: no such thing\nbye"}, "x.c:3: error: no such", "bug"),
        ({"do": "say", "text": "ModuleNotFoundError: No module named 'bcc'"}, "No module", "python3-bpfcc"),
        ({"do": "die"}, "it said nothing", "bug"),
    ],
)
def test_a_child_that_ends_fails_one_question_only(
    start: Start, question: dict[str, str], message: str, remedy: str
) -> None:
    """What the child said last is in the error, and the next question has a new child."""
    with start() as worker:
        before = worker.ask({"do": "answer"})
        with pytest.raises(CompileError, match=message) as error:
            worker.ask(question)
        assert remedy in (error.value.remedy or "")
        assert worker.ask({"do": "answer"}) != before


def test_a_silent_child_is_ended(start: Start) -> None:
    """A child that does not answer in time is killed, and the error says so."""
    with start(timeout_seconds=0.2) as worker, pytest.raises(CompileError, match=r"within 0\.2 s"):
        worker.ask({"do": "sleep"})
