# SPDX-License-Identifier: Apache-2.0
"""YAML to objects, one at a time with its line, from libyaml's events.

PyYAML's own constructor takes several times as long (2.6 s for 2,000 Services with their EndpointSlices, of which the
events are 0.3 s), is recursive, and keeps a whole List in memory. This one knows what `kubectl -o yaml` prints: plain
scalars are null, true, false, integers or else strings; there are no aliases.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

#: Kubernetes objects are a dozen deep; libyaml's time grows with the square of the depth.
_DEEPEST = 100
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_WORDS: dict[str, bool | None] = {
    "": None,
    "~": None,
    "null": None,
    "Null": None,
    "NULL": None,
    "true": True,
    "True": True,
    "TRUE": True,
    "false": False,
    "False": False,
    "FALSE": False,
}


class YamlError(ValueError):
    """The text is no YAML that kubectl prints.

    Attributes:
        line: counted from 1; 0 where unknown.
        problem: what is wrong there.
    """

    def __init__(self, line: int, problem: str) -> None:
        super().__init__(f"line {line}: {problem}" if line else problem)
        self.line = line
        self.problem = problem


@dataclass(frozen=True, slots=True)
class Located:
    """One value of a stream.

    Attributes:
        value: a document, or an item of a document's top-level list `items`.
        document: counted from 1.
        item: counted from 1; 0 for the document itself (whose `items` is then empty).
        line: where it begins, counted from 1; 0 where unknown.
    """

    value: Any
    document: int
    item: int
    line: int


class _Frame:
    """A mapping or sequence that is not complete yet."""

    __slots__ = ("key", "line", "value")

    def __init__(self, value: dict[str, Any] | list[Any], line: int) -> None:
        self.value = value
        self.key: str | None = None
        self.line = line


def read(text: str) -> Iterator[Located]:
    """All objects of a stream: a document's items as they come, then the document without them.

    Raises:
        YamlError: at the first thing that is wrong.
    """
    events = yaml.parse(text, Loader=yaml.CSafeLoader)
    try:
        yield from _objects(events)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        context = f" ({error.context})" if error.context else ""
        raise YamlError(mark.line + 1 if mark else 0, f"{error.problem or 'not YAML'}{context}") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1 if isinstance(error.position, int) else 0
        raise YamlError(line, f"a character that YAML forbids ({error.reason})") from error
    except yaml.YAMLError as error:
        raise YamlError(0, " ".join(str(error).split())) from error


def _objects(events: Iterator[Any]) -> Iterator[Located]:
    stack: list[_Frame] = []
    document = item = 0
    for event in events:
        match event:
            case yaml.ScalarEvent():
                value, line = _scalar(event, stack), _line(event)
            case yaml.MappingStartEvent() | yaml.SequenceStartEvent():
                if len(stack) == _DEEPEST:
                    raise YamlError(_line(event), f"more than {_DEEPEST} levels of nesting")
                stack.append(_Frame({} if isinstance(event, yaml.MappingStartEvent) else [], _line(event)))
                continue
            case yaml.MappingEndEvent() | yaml.SequenceEndEvent():
                frame = stack.pop()
                value, line = frame.value, frame.line
            case yaml.DocumentStartEvent():
                document, item = document + 1, 0
                continue
            case yaml.AliasEvent():
                raise YamlError(_line(event), f"an alias (*{event.anchor}), which kubectl never prints")
            case _:
                continue
        if not stack:
            yield Located(value, document, 0, line)
        elif len(stack) == 2 and stack[0].key == "items" and isinstance(stack[1].value, list):
            item += 1
            yield Located(value, document, item, line)
        else:
            _put(stack[-1], value, line)


def _line(event: yaml.Event) -> int:
    return event.start_mark.line + 1 if event.start_mark else 0


def _put(frame: _Frame, value: Any, line: int) -> None:
    container = frame.value
    if isinstance(container, list):
        container.append(value)
    elif frame.key is not None:
        container[frame.key] = value
        frame.key = None
    elif isinstance(value, str):
        frame.key = value
    else:
        raise YamlError(line, "a mapping key that is no string")


def _scalar(event: yaml.ScalarEvent, stack: list[_Frame]) -> Any:
    text: str = event.value
    is_key = bool(stack) and stack[-1].key is None and isinstance(stack[-1].value, dict)
    if is_key or not event.implicit[0]:
        return text
    if text in _WORDS:
        return _WORDS[text]
    return int(text) if len(text) < 20 and _INTEGER.fullmatch(text) else text
