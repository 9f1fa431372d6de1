# SPDX-License-Identifier: Apache-2.0
"""Records from manifests: YAML or JSON, single objects or Lists, as `kubectl get … -o yaml` (or json) prints them."""

import json
from collections.abc import Iterator
from typing import Any

from kptrace.identity.fields import ObjectError
from kptrace.identity.objects import decode, kind_of
from kptrace.identity.records import Kind, Record
from kptrace.identity.yaml_stream import Located, YamlError, read
from kptrace.model.errors import ManifestError

_REMEDY = "give it what 'kubectl get services,endpointslices,pods,nodes -A -o yaml' prints"

Records = dict[Kind, tuple[Record, ...]]


class MalformedError(ManifestError):
    """A manifest that can be read, but not understood.

    Attributes:
        detail: the message without names of services and pods, for /status.
    """

    def __init__(self, message: str, *, detail: str) -> None:
        super().__init__(message, remedy=_REMEDY)
        self.detail = detail


def parse(data: bytes, origin: str) -> Records:
    """All records, by kind; of two with the same kind and name the later counts. Errors name the file by `origin`.

    Raises:
        MalformedError: with the file, the line as far as known, the document, item and object, and what was expected.
    """
    found: dict[Kind, dict[tuple[str, str], Record]] = {kind: {} for kind in Kind}
    objects = 0
    for located in _located(data, origin):
        objects += 1
        if record := _record(located, origin):
            found[record.kind][record.key] = record
    if not objects:
        detail = "it is empty, expected Kubernetes objects"
        raise MalformedError(f"{origin}: {detail}", detail=detail)
    return {kind: tuple(records.values()) for kind, records in found.items()}


def _located(data: bytes, origin: str) -> Iterator[Located]:
    try:
        text = data.decode("utf-8-sig")
        if text.lstrip().startswith("{"):
            yield from _json_objects(json.loads(text))
        else:
            yield from (located for located in read(text) if located.value is not None)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise _malformed(origin, line, "expected UTF-8 text") from error
    except json.JSONDecodeError as error:
        raise _malformed(origin, error.lineno, f"column {error.colno}: not JSON: {error.msg}") from error
    except RecursionError as error:
        raise _malformed(origin, 0, "JSON that is nested too deeply") from error
    except YamlError as error:
        raise _malformed(origin, error.line, error.problem) from error
    except ValueError as error:
        raise _malformed(origin, 0, f"not JSON: {error}") from error


def _malformed(origin: str, line: int, problem: str) -> MalformedError:
    detail = f"line {line}: {problem}" if line else problem
    return MalformedError(f"{origin}: {detail}", detail=detail)


def _json_objects(value: Any) -> Iterator[Located]:
    items = value.get("items")
    if isinstance(items, list):
        for index, item in enumerate(items, 1):
            yield Located(item, 1, index, 0)
        value = {**value, "items": []}
    yield Located(value, 1, 0, 0)


def _record(located: Located, origin: str) -> Record | None:
    raw = located.value
    try:
        if not isinstance(raw, dict):
            raise ObjectError("", "a mapping", raw)
        kind = kind_of(raw)
        return decode(kind, raw) if kind else None
    except ObjectError as error:
        line = f"line {located.line}: " if located.line else ""
        place = f"{line}document {located.document}" + (f", item {located.item}" if located.item else "")
        name = _title(raw)
        raise MalformedError(
            f"{origin}: {place}{name and f' ({name})'}: {error}",
            detail=f"{place}: {error.path or 'the object'}: expected {error.expected}",
        ) from error


def _title(raw: object) -> str:
    """Kind, namespace and name of an object that may be anything; empty where it has none of them."""
    if not isinstance(raw, dict):
        return ""
    metadata = raw.get("metadata")
    where = [metadata.get("namespace"), metadata.get("name")] if isinstance(metadata, dict) else []
    words = [raw.get("kind"), "/".join(str(part) for part in where if part)]
    return " ".join(str(word) for word in words if word)
