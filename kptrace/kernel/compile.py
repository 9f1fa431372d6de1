# SPDX-License-Identifier: Apache-2.0
"""BCC as a compiler in child processes that exit: this process never maps LLVM.

A request names a source file and the facts that it needs from the kernel's BTF; a child resolves the facts, hands
them to the source as macros, and returns bytecode, map descriptions and the facts. Answers are cached under the hash of
everything that went in, so a restart compiles nothing.
"""

import hashlib
import json
import os
import sys
import tempfile
import threading
from base64 import b64decode
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any

import structlog

from kptrace import __version__
from kptrace.kernel.bytecode import Bytecode, Function
from kptrace.kernel.compile_worker import CompileWorker
from kptrace.kernel.maps import MapSpec, MapType
from kptrace.model.errors import CompileError, UnsupportedError

_FORMAT = 3

#: Why there is no bytecode.
Failure = CompileError | UnsupportedError


@dataclass(frozen=True, slots=True)
class Request:
    """One compilation.

    Attributes:
        source: file name in the package `kptrace.bpf`.
        facts: macro name to what the BTF must tell: `offset:sk_buff:_nfct` (bytes), `struct:nf_conn` (type id),
            `func:bpf_dynptr_from_skb` (type id), `enum:SKB_DROP_REASON_NETFILTER_DROP` (value), or any of them with a
            `?` in front: the macro is then undefined where the kernel has no such thing.
        defines: macro name to value.
    """

    source: str
    facts: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    defines: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))


class Compiler:
    """Compiles requests, or finds them in the cache."""

    def __init__(self, btf: Path, cache_dir: Path | None, *, python: str = sys.executable) -> None:
        """Compile for the kernel whose BTF is the file `btf`; `cache_dir` None switches the cache off."""
        self._btf = btf
        self._cache_dir = cache_dir
        self._python = python
        self._log = structlog.get_logger()
        self._abandoned = threading.Event()
        self._workers: set[CompileWorker] = set()
        self.from_cache = False

    def build(self, request: Request) -> Bytecode:
        """Compile one request, or find it in the cache.

        Raises:
            CompileError: BCC is missing, or the source does not compile.
            UnsupportedError: the kernel has no BTF, or its BTF lacks a fact.
        """
        (answer,) = self.build_each([request])
        if not isinstance(answer, Bytecode):
            raise answer
        return answer

    def build_each(self, requests: Sequence[Request]) -> list[Bytecode | Failure]:
        """Compile requests, in order; those that are not in the cache by one child a CPU, the longest source first."""
        try:
            keys = [self._key(request) for request in requests]
        except OSError as error:
            failure = UnsupportedError(f"no BTF: {error}", remedy="use a kernel with CONFIG_DEBUG_INFO_BTF")
            return [failure for _ in requests]
        answers: dict[int, Bytecode | Failure] = {}
        for number, key in enumerate(keys):
            if (cached := self._read_cache(key)) is not None:
                answers[number] = cached
        self.from_cache = len(answers) == len(requests)
        missing = [number for number in range(len(requests)) if number not in answers]
        questions = {number: _question(requests[number]) for number in missing}
        queue = deque(sorted(missing, key=lambda number: -len(questions[number]["text"])))
        children = min(len(missing), len(os.sched_getaffinity(0)))

        def work() -> None:
            with CompileWorker(self._btf, python=self._python) as worker, suppress(IndexError):
                self._workers.add(worker)
                try:
                    while True:  # until the queue is empty
                        number = queue.popleft()
                        answers[number] = self._compile(worker, questions[number], keys[number])
                finally:
                    self._workers.discard(worker)

        if children:
            with ThreadPoolExecutor(max_workers=children) as pool:
                for done in [pool.submit(work) for _ in range(children)]:
                    done.result()
        return [answers[number] for number in range(len(requests))]

    def abandon(self) -> None:
        """End what is being compiled, and compile nothing any more: whoever waits for it gets a CompileError."""
        self._abandoned.set()
        for worker in tuple(self._workers):
            worker.kill()

    def _compile(self, worker: CompileWorker, question: Mapping[str, Any], key: str) -> Bytecode | Failure:
        if self._abandoned.is_set():
            return CompileError("it was given up before it was compiled", remedy="start again")
        try:
            text = worker.ask(question)
            answer = _decode(text)
        except (CompileError, UnsupportedError) as error:
            return error
        self._write_cache(key, text)
        return answer

    def _key(self, request: Request) -> str:
        digest = hashlib.sha256(f"{_FORMAT} {__version__}".encode())
        digest.update(self._btf.read_bytes())
        root = resources.files("kptrace.bpf")
        headers = sorted((root / "include/kptrace").iterdir(), key=lambda entry: entry.name)
        for entry in [*headers, root / request.source]:
            digest.update(entry.read_bytes())
        digest.update(repr((request.source, dict(request.facts), dict(request.defines))).encode())
        return digest.hexdigest()

    def _read_cache(self, key: str) -> Bytecode | None:
        if self._cache_dir is None:
            return None
        path = self._cache_dir / f"{key}.json"
        try:
            return _decode(path.read_text())
        except FileNotFoundError:
            return None
        except (OSError, CompileError) as error:
            self._log.warning("compile_cache_unreadable", path=str(path), error=str(error))
            return None

    def _write_cache(self, key: str, text: str) -> None:
        if self._cache_dir is None:
            return
        try:
            self._cache_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            fd, temporary = tempfile.mkstemp(dir=self._cache_dir)
            with os.fdopen(fd, "w") as file:
                file.write(text)
            Path(temporary).rename(self._cache_dir / f"{key}.json")
        except OSError as error:
            self._log.warning("compile_cache_unwritable", path=str(self._cache_dir), error=str(error))


def _question(request: Request) -> dict[str, Any]:
    root = resources.files("kptrace.bpf")
    return {
        "include": str(root / "include"),
        "text": (root / request.source).read_text(),
        "facts": dict(request.facts),
        "defines": dict(request.defines),
    }


def _decode(text: str) -> Bytecode:
    try:
        answer = json.loads(text)
        return Bytecode(
            functions={
                name: Function(b64decode(f["code"]), {int(i): m for i, m in f["maps"].items()})
                for name, f in answer["functions"].items()
            },
            maps={
                m["name"]: MapSpec(
                    m["name"],
                    MapType(m["type"]),
                    m["key_size"],
                    m["value_size"],
                    m["max_entries"],
                    m["flags"],
                )
                for m in answer["maps"]
            },
            values=answer["values"],
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CompileError(
            f"the compiler's answer cannot be read: {error!r}", remedy="delete the cache"
        ) from error
